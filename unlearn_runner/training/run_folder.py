"""The run folder: what a run leaves behind, and who may write it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import yaml
from jaxtyping import UInt8
from torch import Tensor

from unlearn_runner.cache import atomic, fingerprint, write_json
from unlearn_runner.distributed import from_first, is_first
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.schema import METRICS_VERSION, SUMMARY_VERSION
from unlearn_runner.training.checkpoint import Checkpoint, open_checkpoint

# What may differ between a run and its continuation, or between two places where the same run is made.
NOT_IDENTITY = ("resume_from_checkpoint", "skip_finished", "objective", "paths", "logger", "hardware")


def config_hash(config: dict[str, Any]) -> str:
    """The same for two runs that must give the same result."""
    return fingerprint({key: value for key, value in config.items() if key not in NOT_IDENTITY})


@final
class RunFolder:
    """outputs/<date>/<name>/<job>/ with config.yaml, metrics.jsonl, summary.json, samples/, model/, checkpoints/."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config_hash = config_hash(config)
        config = {**config, "resume_from_checkpoint": None}  # made again from here, the run is whole
        self._lines: Any = None
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
            with atomic(path / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            self._lines = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if self._lines.tell() == 0:  # a resumed run goes on in the file that it has
                self.append(0, {"version": METRICS_VERSION})
        except OSError as error:
            raise unwritable(path, error) from error

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def append(self, step: int, values: dict[str, float | int]) -> None:
        """One line of metrics.jsonl."""
        self._lines.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._lines.flush()

    def lines(self) -> list[dict[str, Any]]:
        """Everything appended so far."""
        with open(self.path / "metrics.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def position(self) -> int:
        """Where the next line of metrics.jsonl will begin, in bytes."""
        return self._lines.tell()

    def truncate(self, position: int) -> None:
        """Forget the lines written after a checkpoint."""
        self._lines.truncate(position)
        self._lines.seek(position)

    def save_grid(self, name: str, images: UInt8[Tensor, "n c h w"], columns: int) -> Path:
        """samples/<name>.png, enlarged so that small images can be looked at."""
        from torchvision.utils import make_grid, save_image

        factor = max(1, 48 // images.shape[-1])
        enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        path = self.path / "samples" / f"{name}.png"
        save_image(make_grid(enlarged.float() / 255, nrow=columns, padding=2, pad_value=0.5), path)
        return path

    def write_summary(self, status: str, metrics: dict[str, float], **more: Any) -> None:
        """summary.json: status, metrics, provenance."""
        content = {
            "version": SUMMARY_VERSION,
            "status": status,
            "config_hash": self.config_hash,
            "metrics": metrics,
            **more,
        }
        write_json(self.path / "summary.json", content)

    def save_model(self, save: Callable[[Path], None]) -> None:
        """model/, whole or not at all."""
        with atomic(self.model) as temporary:
            save(temporary)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


@final
class NoFolder:
    """The run folder in the eyes of a process that only helps: nothing is written, and nothing is there."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def append(self, step: int, values: dict[str, float]) -> None:
        pass

    def lines(self) -> list[dict[str, Any]]:
        return []

    def position(self) -> int:
        return 0

    def truncate(self, position: int) -> None:
        pass

    def save_grid(self, name: str, images: UInt8[Tensor, "n c h w"], columns: int) -> Path:
        return self.path / "samples" / f"{name}.png"

    def write_summary(self, status: str, metrics: dict[str, float], **more: Any) -> None:
        pass

    def save_model(self, save: Callable[[Path], None]) -> None:
        pass

    def close(self) -> None:
        pass


def claim(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, ...: a folder that no other run has, whatever the clock says."""
    for number in range(1, 10_000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            os.close(os.open(candidate / ".claimed", os.O_CREAT | os.O_EXCL))
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(candidate, error) from error
    raise ConfigurationError(f"{path}: ten thousand runs have this name already; set another hydra.run.dir.")


def open_run_folder(fresh: Path, checkpoint: Checkpoint | None, config: dict[str, Any]) -> RunFolder | NoFolder:
    """That of the run which is resumed, or a fresh one; the first process writes into it."""
    path = from_first(lambda: claim(fresh)) if checkpoint is None else checkpoint.run_folder
    return RunFolder(path, config) if is_first() else NoFolder(path)


def checkpoint_to_resume(wanted: str | None, outputs: Path, config: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means.

    null: none. "latest": the newest one of an unfinished run of the same configuration, none if there is none,
    so that a preempted job is continued by the command that began it. Else a path.
    """
    if wanted == "latest":
        wanted = from_first(lambda: unfinished(outputs, config))
    return None if wanted is None else open_checkpoint(wanted)


def unfinished(outputs: Path, config: dict[str, Any]) -> Path | None:
    """The newest run below `outputs` of this very configuration that has a checkpoint but did not finish."""
    found = [
        folder
        for folder, status in _runs_of(outputs, config)
        if status != "finished" and any((folder / "checkpoints").glob("step_*"))
    ]
    return max(found, key=lambda folder: (folder / "summary.json").stat().st_mtime) if found else None


def finished(places: Iterable[Path], config: dict[str, Any]) -> Path | None:
    """A run below one of these folders of this very configuration that has finished."""
    runs = (run for place in places for run in _runs_of(place, config))
    return next((folder for folder, status in runs if status == "finished"), None)


def _runs_of(outputs: Path, config: dict[str, Any]) -> Iterator[tuple[Path, str | None]]:
    """Folders of this configuration, with their status."""
    wanted = config_hash(config)
    for summary in outputs.glob("**/summary.json"):
        try:
            content = json.loads(summary.read_text())
        except (OSError, ValueError):
            continue
        if content.get("config_hash") == wanted:
            yield summary.parent, content.get("status")


def objectives(folder: Path, names: str | Sequence[str] | None) -> float | tuple[float, ...] | None:
    """The scores of a finished run by these names: one, several or none."""
    if names is None:
        return None
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    for name in [names] if isinstance(names, str) else names:
        if name not in metrics:
            known = ", ".join(sorted(key for key in metrics if key.startswith("eval/") and key.count("/") == 1))
            raise ConfigurationError(f"objective: there is no score '{name}' in {folder}; there are {known}.")
    return metrics[names] if isinstance(names, str) else tuple(metrics[name] for name in names)


def unwritable(path: Path, error: OSError) -> ConfigurationError:
    """The sentence for a run folder that cannot be written."""
    return ConfigurationError(
        f"cannot write the run folder {path}: {error.strerror}; make room or give another place, "
        "e.g. hydra.run.dir=/some/folder."
    )

"""The run folder: what a run leaves behind, what tells runs apart, and who may write it."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import yaml
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unlearn_runner.cache import atomic, fingerprint, sweep, write_json
from unlearn_runner.distributed import from_first
from unlearn_runner.errors import ConfigurationError, no_checkpoint, writing
from unlearn_runner.hardware import Hardware
from unlearn_runner.owner import CLAIM, Ownership, require_no_owner
from unlearn_runner.schema import METRICS_VERSION, SUMMARY_VERSION
from unlearn_runner.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    Checkpoints,
    damaged,
    differences,
    newest_whole,
    put_aside,
    read_checkpoint,
    read_manifest,
    reading_checkpoint,
    require_whole,
)
from unlearn_runner.trust import literal
from unlearn_runner.weights import weights_identity

LINES, SUMMARY = "metrics.jsonl", "summary.json"
STEPS, SCHEDULE = "trainer.max_steps", ".num_training_steps"

# What may differ between a run and its continuation, or between two places where the same run is made: no score and no
# weight depends on it, but for float32's rounding.
NOT_IDENTITY = (
    "resume_from_checkpoint", "skip_finished", "objective",  # what is done with runs
    "name", "label", "choices",  # how it is called, and what was chosen, which the chosen parts say themselves
    "budget",  # of it, too, what counts is where it is used
    "paths", "logger", "security", "hardware",  # of hardware the precision counts
    "trainer.log_every", "trainer.checkpointing_steps", "trainer.checkpoints_total_limit", "trainer.keep_checkpoints",
)  # fmt: skip
PLACES = ("cache_dir",)  # last words of options that name a place alone
CONTENTS = (  # of files, by their bytes
    "weights", "policy", "pretrained", "inception_weights", "open_clip_pretrained", "dinov2_weights", "file",
)  # fmt: skip
DATA, PARENT = "dataset.fingerprint", "parent"  # known once the images are read; of a longer run, what it goes on from


def identity_of_run(config: dict[str, Any]) -> dict[str, Any]:
    """All options that decide a run's weights and scores, by their full names, with weights by their bytes."""
    identity = {}
    for name, value in flat(config):
        parts = name.split(".")
        if any(".".join(parts[:length]) in NOT_IDENTITY for length in range(1, len(parts) + 1)) or parts[-1] in PLACES:
            continue
        identity[name] = contents_of(value) if parts[-1] in CONTENTS and isinstance(value, str) else value
    if "hardware" in config:
        hardware = Hardware(**{name: value for name, value in config["hardware"].items() if name != "_target_"})
        identity["hardware.mixed_precision"] = hardware.beyond_rounding.get("precision", "no")
    return json.loads(json.dumps(identity))  # as a checkpoint will give it back


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its full name; an empty node by its own."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def contents_of(source: str) -> str:
    """What tells a file of weights, or a folder of them, from another: not its place."""
    place = Path(source).expanduser()
    policy = [place / part / name for part in ("policy", ".") for name in ("policy.safetensors", "policy.json")]
    found = [path for path in policy if path.is_file()][:2] or [source]
    try:
        return " ".join(weights_identity(path) for path in found)
    except OSError:  # whoever loads it will say what is wrong with it
        return source


def hash_of(identity: dict[str, Any]) -> str:
    """The same for two runs that must give the same result, before their images are read."""
    return fingerprint({name: value for name, value in identity.items() if name != DATA})


def config_hash(config: dict[str, Any]) -> str:
    """The same for two configurations that must give the same result."""
    return hash_of(identity_of_run(config))


def is_longer(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two identities differ by a larger `trainer.max_steps` alone, and by schedules that are as long."""
    steps = (there.get(STEPS), here.get(STEPS))
    if not all(isinstance(number, int) for number in steps) or not steps[0] < steps[1]:
        return False
    return all(
        pair == steps and (name == STEPS or (name.startswith("method.") and name.endswith(SCHEDULE)))
        for name, pair in differences(there, here).items()
    )


def continued(identity: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The identity of the run that goes on from a checkpoint: its own, and its parent if it is a longer run than that.

    Raises ConfigurationError, naming what differs, if the checkpoint is of another run.
    """
    apart = (PARENT, *([] if DATA in identity and DATA in checkpoint.identity else [DATA]))
    there, here = (
        {name: value for name, value in known.items() if name not in apart} for known in (checkpoint.identity, identity)
    )
    if is_longer(there, here):
        parent = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step}
        return identity | {PARENT: {**parent, "config_hash": hash_of(checkpoint.identity)}}
    checkpoint._replace(identity=there).require(here)
    return identity | {PARENT: checkpoint.identity[PARENT]} if PARENT in checkpoint.identity else identity


@final
class RunFolder:
    """outputs/<date>/<name>/<job>/ with config.yaml, metrics.jsonl, summary.json, samples/, model/, checkpoints/.

    It belongs to this process until `close`. Raises ConfigurationError if it belongs to another one that is running, or
    cannot be written.
    """

    def __init__(self, path: Path, config: dict[str, Any], identity: dict[str, Any] | None = None):
        self.path = path
        identity = identity_of_run(config) if identity is None else identity
        self.config_hash, self.parent = hash_of(identity), identity.get(PARENT)
        # made again from here, the run is whole, or goes on from where it came from
        config = {**config, "resume_from_checkpoint": self.parent and self.parent["checkpoint"]}
        self._lines: Any = None
        self._owner: Ownership | None = None
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
            self._owner = Ownership(path)
            sweep(path)
            with atomic(path / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(literal(config), sort_keys=False, allow_unicode=True))
            self._lines = open(path / LINES, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if self._lines.tell() == 0:  # a resumed run goes on in the file that it has
                self.append(0, {"version": METRICS_VERSION})
        except OSError as error:
            with suppress(OSError):
                self.close()
            raise unwritable(path, error) from error

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def append(self, step: int, values: dict[str, float | int]) -> None:
        """One line of metrics.jsonl."""
        self._owner.require()
        with writing(self.path / LINES):
            self._lines.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._lines.flush()

    def lines(self) -> list[dict[str, Any]]:
        """Everything appended so far."""
        with open(self.path / LINES, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def position(self) -> int:
        """Where the next line of metrics.jsonl will begin, in bytes."""
        return self._lines.tell()

    def truncate(self, position: int) -> None:
        """Forget the lines written after a checkpoint."""
        self._lines.truncate(position)
        self._lines.seek(position)

    def save_grid(self, name: str, images: UInt8[Tensor, "n c h w"], columns: int, titles: Sequence[str] = ()) -> Path:
        """samples/<name>.png, enlarged so that small images can be looked at; beside each row its title, if there is
        one for each.
        """
        from torchvision.utils import make_grid, save_image

        from unlearn_runner.comparison.pictures import beside_rows

        factor = max(1, 48 // images.shape[-1])
        enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        path = self.path / "samples" / f"{name}.png"
        with atomic(path) as temporary:
            save_image(make_grid(enlarged.float() / 255, nrow=columns, padding=2, pad_value=0.5), temporary, "PNG")
            if len(titles) * columns == len(images):
                with Image.open(temporary) as grid:
                    titled = beside_rows(grid, titles)
                titled.save(temporary, "PNG")
        return path

    def write_inventory(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """data.jsonl: a line for each file of the data."""
        with atomic(self.path / "data.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def write_summary(self, status: str, metrics: dict[str, float], **more: Any) -> None:
        """summary.json: status, metrics, provenance."""
        content = {
            "version": SUMMARY_VERSION,
            "status": status,
            "config_hash": self.config_hash,
            "metrics": metrics,
            **({} if self.parent is None else {"parent": self.parent}),
            **more,
        }
        self._owner.require()
        write_json(self.path / SUMMARY, content)

    def save_model(self, save: Callable[[Path], None]) -> None:
        """model/, whole or not at all."""
        with atomic(self.model) as temporary:
            save(temporary)

    def write_card(self, text: str) -> None:
        """model/README.md."""
        with atomic(self.model / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def drop_checkpoints(self) -> None:
        """Nobody needs those of a finished run but for a longer one."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Nobody's from now on."""
        try:
            if self._lines is not None:
                self._lines.close()
        finally:
            if self._owner is not None:
                self._owner.release()


def claim(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, ...: a folder that no other run has, whatever the clock says."""
    for number in range(1, 10_000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            os.close(os.open(candidate / CLAIM, os.O_CREAT | os.O_EXCL))
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(candidate, error) from error
    raise ConfigurationError(f"{path}: ten thousand runs have this name already; set another hydra.run.dir.")


def open_run_folder(
    fresh: Path, checkpoint: Checkpoint | None, config: dict[str, Any], identity: dict[str, Any]
) -> tuple[Path, RunFolder | None]:
    """That of the run which is resumed; a fresh one for a new or a longer run. The first process alone has it open."""
    longer = checkpoint is not None and identity.get(PARENT) != checkpoint.identity.get(PARENT)
    opened: list[RunFolder] = []

    def open_it() -> Path:
        path = claim(fresh) if checkpoint is None or longer else checkpoint.run_folder
        if longer:  # what the parent has logged until then is this run's past
            position = position_in(checkpoint)
            with atomic(path / LINES) as temporary:
                temporary.write_bytes((checkpoint.run_folder / LINES).read_bytes()[:position])
        opened.append(RunFolder(path, config, identity))
        return path

    path = from_first(open_it)
    return path, opened[0] if opened else None


def position_in(checkpoint: Checkpoint) -> int:
    """How many bytes metrics.jsonl had when a checkpoint was written, as the recorder has stored it."""
    return checkpoint.state["listeners"]["recorder"]["position"]


def checkpoint_to_resume(
    wanted: str | None, outputs: Path, identity: dict[str, Any], extendable: bool = True
) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means, of this run or, by a path, of a shorter one. Touches nothing
    of any other run.

    null: none. "latest": the newest whole one of an unfinished run of the same configuration, none if there is none,
    so that a preempted job is continued by the command that began it. Else a path, of a run or of its checkpoint.

    Raises ConfigurationError if there is none at the path, if its run differs, has finished or is still running, or if
    the checkpoint or the log up to it is damaged.
    """
    if wanted is None:
        return None
    folder = from_first(lambda: _newest(wanted, outputs, identity) if wanted == "latest" else _given(wanted, identity))
    if folder is None:
        return None
    checkpoint = read_checkpoint(folder)
    run = checkpoint.run_folder
    longer = continued(identity, checkpoint).get(PARENT) != checkpoint.identity.get(PARENT)
    if longer and not extendable:
        raise ConfigurationError(
            f"resume_from_checkpoint={wanted}: {STEPS} must be {checkpoint.identity[STEPS]}, as it is there, got "
            f"{identity[STEPS]}: an agent knows how long its run is, so that cannot change."
        )
    if not longer and status_of(run) == "finished":
        raise finished_already(wanted)
    try:
        position = position_in(checkpoint)
    except (KeyError, TypeError) as error:
        raise damaged(folder, ValueError(f"it has no {error}")) from error
    require_log(run / LINES, position)
    return checkpoint


def _newest(wanted: str, outputs: Path, identity: dict[str, Any]) -> Path | None:
    run = unfinished(outputs, identity)
    if run is None:
        return None
    require_no_owner(run)
    folder, faults = newest_whole(run)
    put_aside(faults)
    if folder is None:
        print(f"{run} has no whole checkpoint: the run begins anew, in a folder of its own", flush=True)
    return folder


def _given(wanted: str, identity: dict[str, Any]) -> Path:
    run = Path(wanted).expanduser().resolve()
    if (run / MANIFEST).is_file():
        folder, faults = run, {}
    else:
        folder, faults = newest_whole(run)
        if folder is None and not faults:
            if status_of(run) == "finished":
                raise finished_already(wanted)
            raise no_checkpoint(wanted)
        if folder is None:
            newest, fault = next(iter(faults.items()))
            raise damaged(newest, ValueError(fault))
    with reading_checkpoint(folder, OSError, ValueError):
        manifest = require_whole(folder) if folder == run else read_manifest(folder)
    continued(identity, Checkpoint(folder, manifest["step"], manifest["identity"], {}))
    require_no_owner(folder.parent.parent)
    put_aside(faults)
    return folder


def require_log(path: Path, position: int) -> None:
    """Raise ConfigurationError unless the first `position` bytes of a metrics.jsonl are whole lines, each an object."""
    content = path.read_bytes() if path.is_file() else b""
    fault = f"it has {len(content)} bytes, of which {position} were there" if len(content) < position else None
    for number, line in enumerate(content[:position].split(b"\n")[:-1] if fault is None else [], start=1):
        try:
            whole = isinstance(json.loads(line)["step"], int)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            fault = f"line {number} is no JSON object with a step"
            break
    if fault is None and not content[:position].endswith(b"\n"):
        fault = "its last line is not whole"
    if fault is not None:
        raise ConfigurationError(
            f"{path} is damaged before the checkpoint ({fault}): mend the file, or leave resume_from_checkpoint out "
            "and start again."
        )


def finished_already(wanted: str) -> ConfigurationError:
    return ConfigurationError(
        f"resume_from_checkpoint={wanted}: this run has finished, nothing is left to do; a larger trainer.max_steps "
        "goes on from its last checkpoint, which it has if it was made with trainer.keep_checkpoints=true."
    )


def unfinished(outputs: Path, identity: dict[str, Any]) -> Path | None:
    """The newest run below `outputs` of this very identity that has a checkpoint but did not finish."""
    found = [
        folder
        for folder, status in _runs_of(outputs, identity)
        if status != "finished" and Checkpoints(folder / "checkpoints").all()
    ]
    return max(found, key=lambda folder: (folder / SUMMARY).stat().st_mtime) if found else None


def finished(places: Iterable[Path], config: dict[str, Any]) -> Path | None:
    """A run below one of these folders of this very configuration that has finished."""
    identity = identity_of_run(config)
    runs = (run for place in places for run in _runs_of(place, identity))
    return next((folder for folder, status in runs if status == "finished"), None)


def _runs_of(outputs: Path, identity: dict[str, Any]) -> Iterator[tuple[Path, str | None]]:
    """Folders of this identity, with their status. A run whose summary is damaged is known by its checkpoints."""
    wanted = hash_of(identity)
    for path in outputs.glob(f"**/{SUMMARY}"):
        content = read_object(path)
        found = None if content is None else content.get("config_hash")
        for folder in Checkpoints(path.parent / "checkpoints").all()[-1:] if content is None else []:
            with suppress(OSError, ValueError):
                found = hash_of(read_manifest(folder)["identity"])
        if found == wanted:
            yield path.parent, status_of(path.parent)


def status_of(run: Path) -> str | None:
    """As its summary says; None if that is not there or damaged."""
    status = (read_object(run / SUMMARY) or {}).get("status")
    return status if isinstance(status, str) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None if there is none: other programs, too, write files of this name."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def objectives(folder: Path, names: str | Sequence[str] | None) -> float | tuple[float, ...] | None:
    """The scores of a finished run by these names: one, several or none."""
    if names is None:
        return None
    metrics = (read_object(folder / SUMMARY) or {}).get("metrics", {})
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

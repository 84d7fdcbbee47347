"""Checkpoints: everything a resumed run needs, written whole or not at all, read without pickles."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from unlearn_runner.cache import atomic, write_json
from unlearn_runner.distributed import is_first
from unlearn_runner.errors import ConfigurationError, first_line

STATE, MANIFEST = "state.pt", "manifest.json"
VERSION = 1


class Checkpoint(NamedTuple):
    """A checkpoint that was opened and found whole."""

    folder: Path
    step: int
    identity: dict[str, str]
    state: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        return self.folder.parent.parent

    def require(self, identity: dict[str, str]) -> None:
        """Raise ConfigurationError unless the checkpoint is of this model, method and dataset."""
        for name, wanted in identity.items():
            found = self.identity.get(name)
            if found != wanted:
                raise ConfigurationError(
                    f"resume_from_checkpoint={self.folder}: it is of another {name} ({found}) than this run's "
                    f"({wanted}); start it with the configuration in {self.run_folder / 'config.yaml'}."
                )


@final
class Checkpoints:
    """The folder `checkpoints/` of a run: `step_<n>/`, of which the newest `total_limit` are kept."""

    def __init__(self, folder: Path, total_limit: int | None = None):
        self.folder = folder
        self.total_limit = total_limit

    def save(self, step: int, state: dict[str, Any], identity: dict[str, str]) -> Path:
        """Write `step_<n>/` under a temporary name and rename it; then remove what is over the limit."""
        path = self.folder / f"step_{step:06d}"
        if not is_first():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.mkdir()
            try:
                torch.save(state, temporary / STATE)
            except RuntimeError as error:  # torch's writer does not say what failed
                raise OSError(errno.EIO, "not all of it was written, is the disk full?", str(path)) from error
            size = (temporary / STATE).stat().st_size
            write_json(
                temporary / MANIFEST,
                {"version": VERSION, "step": step, "identity": identity, "files": {STATE: size}},
            )
        if self.total_limit is not None:
            for old in self.all()[: -self.total_limit]:
                shutil.rmtree(old)
        return path

    def all(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        named = [path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
        return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, given its folder or its run's folder (then the newest one).

    Raises ConfigurationError if there is none, or if it is cut off.
    """
    folder = Path(path).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        found = Checkpoints(folder / "checkpoints").all()
        if not found:
            raise ConfigurationError(
                f"resume_from_checkpoint={path}: expected a run folder or its checkpoints/step_<n>, "
                "found no checkpoint there."
            )
        folder = found[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        size = (folder / STATE).stat().st_size
        if size != manifest["files"][STATE]:
            raise EOFError(f"{STATE} has {size} bytes instead of {manifest['files'][STATE]}")
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return Checkpoint(folder, manifest["step"], manifest["identity"], state)
    except Exception as error:  # whatever a foreign or damaged file makes json and torch raise
        raise ConfigurationError(
            f"resume_from_checkpoint={folder}: the checkpoint is damaged ({first_line(error)}); "
            "resume from an earlier one or start again."
        ) from error

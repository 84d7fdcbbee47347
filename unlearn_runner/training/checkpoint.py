"""Checkpoints: everything a resumed run needs, written whole or not at all, read without pickles."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from unlearn_runner.cache import atomic, set_aside, write_json
from unlearn_runner.distributed import is_first
from unlearn_runner.errors import ConfigurationError, first_line, no_checkpoint
from unlearn_runner.schema import file_digest

STATE, MANIFEST = "state.pt", "manifest.json"
VERSION = 3  # 3: a clock, and states of listeners by name; 2: digests, and an identity of all options
TARGET = "._target_"
NOT_THERE = "none"


class Checkpoint(NamedTuple):
    """A checkpoint that was opened and found whole."""

    folder: Path
    step: int
    identity: dict[str, Any]  # of the run: all options that decide its result
    state: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        return self.folder.parent.parent

    def require(self, identity: dict[str, Any]) -> None:
        """Raise ConfigurationError, naming what differs, unless it is of a run of this identity."""
        found = "; ".join(
            f"of another {name} ({there}) than this run's ({here})"
            for name, there, here in for_a_person(differences(self.identity, identity))
        )
        if found:
            raise ConfigurationError(
                f"resume_from_checkpoint={self.folder}: it is {found}; start it with the configuration in "
                f"{self.run_folder / 'config.yaml'}, or leave resume_from_checkpoint out."
            )


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two identities do not agree in: the values of both, NOT_THERE where one has none."""
    keys = {**there, **here}
    pairs = {
        key: (there.get(key, NOT_THERE), here.get(key, NOT_THERE)) for key in keys if f"{key}{TARGET}" not in keys
    }  # of a part that one of the two has, and the other null, its class is enough
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def for_a_person(differing: dict[str, tuple[Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Differences for a person: of an exchanged part its name alone, of one value in several places the first."""
    exchanged = [key.removesuffix(TARGET) for key in differing if key.endswith(TARGET)]
    found: dict[tuple[str, str, str], tuple[str, Any, Any]] = {}
    for key in sorted(differing, key=lambda key: (key.count("."), key)):
        there, here = differing[key]
        if key.endswith(TARGET):
            key, there, here = key.removesuffix(TARGET), *(str(value).rpartition(".")[2] for value in (there, here))
        if not any(key.startswith(f"{part}.") for part in exchanged):
            found.setdefault((key.rpartition(".")[2], str(there), str(here)), (key, there, here))
    return list(found.values())


@final
class Checkpoints:
    """The folder `checkpoints/` of a run: `step_<n>/`, of which the newest `total_limit` are kept."""

    def __init__(self, folder: Path, total_limit: int | None = None):
        self.folder = folder
        self.total_limit = total_limit

    def save(self, step: int, state: dict[str, Any], identity: dict[str, Any]) -> Path:
        """Write `step_<n>/` under a temporary name and rename it; then remove what is over the limit."""
        path = self.folder / f"step_{step:06d}"
        if not is_first():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.mkdir()
            torch.save(state, temporary / STATE)
            files = {STATE: (temporary / STATE).stat().st_size}
            digests = {STATE: file_digest(temporary / STATE)}
            content = {"version": VERSION, "step": step, "identity": identity, "files": files, "digests": digests}
            write_json(temporary / MANIFEST, content)
        if self.total_limit is not None:
            for old in self.all()[: -self.total_limit]:
                going = old.with_name(f".{old.name}.{os.getpid()}.tmp")  # no reader shall meet the half of it
                os.replace(old, going)
                shutil.rmtree(going)
        return path

    def all(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        named = [path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
        return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, given its folder or its run's folder (then the newest one).

    Raises ConfigurationError if there is none, or if it is damaged.
    """
    folder = Path(path).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        found = Checkpoints(folder / "checkpoints").all()
        if not found:
            raise no_checkpoint(str(path))
        folder = found[-1]
    with reading_checkpoint(folder, OSError, ValueError):
        require_whole(folder)
    return read_checkpoint(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint that is known to be whole. Raises ConfigurationError if it holds what torch does not load."""
    with reading_checkpoint(folder, Exception):  # whatever it is that damaged files make torch raise
        manifest = read_manifest(folder)
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(folder, manifest["step"], manifest["identity"], state)


def require_whole(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose state is as it was written; raises OSError or ValueError for any other."""
    manifest = read_manifest(folder)
    size = (folder / STATE).stat().st_size
    if size != manifest["files"][STATE]:
        raise ValueError(f"{STATE} has {size} bytes instead of {manifest['files'][STATE]}")
    if file_digest(folder / STATE) != manifest["digests"][STATE]:
        raise ValueError(f"{STATE} has changed since it was written")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if there is none or it is damaged, ConfigurationError if of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except RecursionError as error:
        raise ValueError(f"{MANIFEST} is nested too deeply") from error
    try:
        version, files, digests = manifest["version"], manifest["files"], manifest.get("digests", {STATE: ""})
        found = (manifest["step"], manifest["identity"], files[STATE], digests[STATE])
    except (KeyError, TypeError, AttributeError):
        version, found = None, ()
    if [type(value) for value in found] != [int, dict, int, str]:
        raise ValueError(f"{MANIFEST} does not say what it has to")
    if version != VERSION:
        raise ConfigurationError(
            f"resume_from_checkpoint={folder}: it is of version {version}, and this unlearn_runner reads version "
            f"{VERSION}; go on with the unlearn_runner that wrote it, or begin anew without resume_from_checkpoint."
        )
    return manifest


def newest_whole(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, and the damaged ones that are newer, each with its fault.

    Raises ConfigurationError if the newest that is not damaged is of another version.
    """
    faults: dict[Path, str] = {}
    for folder in reversed(Checkpoints(run / "checkpoints").all()):
        try:
            require_whole(folder)
        except ConfigurationError:  # of another version, which is no damage
            raise
        except (OSError, ValueError) as error:
            faults[folder] = first_line(error)
        else:
            return folder, faults
    return None, faults


def put_aside(faults: dict[Path, str]) -> None:
    """Rename damaged checkpoints, so that nobody looks for what they hold, and say so."""
    for folder, fault in faults.items():
        aside = set_aside(folder)
        print(f"the checkpoint {folder} is damaged ({fault}): set aside as {aside.name}", flush=True)


@contextmanager
def reading_checkpoint(folder: Path, *faults: type[Exception]) -> Iterator[None]:
    """What is raised in here of these kinds says that the checkpoint is damaged; a ConfigurationError, which is a
    ValueError, says itself what is wrong.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except faults as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> ConfigurationError:
    """The sentence for a checkpoint that cannot be read."""
    # torch's own advice is to read pickles, which can run code
    fault = "it holds more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else first_line(error)
    return ConfigurationError(
        f"resume_from_checkpoint={folder}: the checkpoint is damaged ({fault}); resume from an earlier one or start "
        "again."
    )

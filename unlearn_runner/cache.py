"""What is expensive is made once: base models, oracles and classifiers, in folders named by a hash."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from unlearn_runner.distributed import from_first, own_copy
from unlearn_runner.errors import ConfigurationError, first_line, writing
from unlearn_runner.schema import file_digest

KEY, DIGESTS = "key.json", "manifest.json"
DIGESTS_VERSION = 1

_found_whole: dict[Path, list[tuple[str, int, int]]] = {}  # entries by this process, with their files' sizes and times


def fingerprint(key: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON-able value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of the SHA-256 of named tensors, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def cached(
    root: Path,
    kind: str,
    key: dict[str, Any],
    make: Callable[[Path], None],
    read: Callable[[Path], Any] | None = None,
    together: bool = False,
    continues: str | None = None,
) -> Path:
    """The folder `<root>/<kind>/<hash of key>`, filled by `make(<folder>.partial)` if it is not there yet.

    A lock lets one of several parallel jobs make it while the others wait; that of a dead process is free. The folder
    appears by a rename when `make` has returned, with the digests of its files, by which every process that uses it
    sees whether it is whole. One that is not is set aside as `<hash>.damaged-<n>`, with a line, and made again. An
    entry without digests, made before there were any, is whole if its key is right and `read(folder)` raises nothing;
    it gets digests then.

    What an interrupted `make` left in `<folder>.partial` is thrown away, but for what is in its folder `continues`,
    from which the next one may go on.

    Of several processes of one job the first makes it and the others wait, or, `together`, all take part and what the
    first has written counts.

    Raises ConfigurationError if it has to be made and there is no place for it.
    """
    folder = Path(root) / kind / fingerprint(key)
    if together:
        _fill(folder, key, make, read, continues)
    else:
        from_first(lambda: _fill(folder, key, make, read, continues))
    return folder


def cached_scores(
    root: Path, kind: str, key: dict[str, Any], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """The scores that `measure()` returns, kept in the cache; what is no finite number comes back as NaN."""

    def make(folder: Path) -> None:
        write_json(folder / "scores.json", measure())

    def read(folder: Path) -> dict[str, float]:
        scores = json.loads((folder / "scores.json").read_text())
        return {name: math.nan if value is None else value for name, value in scores.items()}

    return read(cached(root, kind, key, make, read, together=True))


def _fill(
    folder: Path,
    key: dict[str, Any],
    make: Callable[[Path], None],
    read: Callable[[Path], Any] | None,
    continues: str | None,
) -> None:
    fault = from_first(lambda: _fault(folder, key, read))
    if fault is None:
        return
    lock, partial = FileLock(f"{folder}.lock"), folder.with_suffix(".partial")
    from_first(lambda: _acquire(lock, folder, fault))
    try:
        fault = from_first(lambda: _fault(folder, key, read))
        if fault is not None:  # no other process has made it meanwhile
            from_first(lambda: _make_room(folder, fault, partial, continues))
            with own_copy(partial) as place:
                make(place)
            from_first(lambda: _appear(partial, folder, key))
    finally:
        lock.release()


def _fault(folder: Path, key: dict[str, Any], read: Callable[[Path], Any] | None) -> str | None:
    """Why an entry cannot be used; None if it can."""
    if not os.path.lexists(folder):
        return "it is not there"
    try:
        files = _stamps(folder)
        if _found_whole.get(folder) == files:
            return None
        _require_whole(folder, key, read)
        _found_whole[folder] = _stamps(folder)
    except PermissionError as error:
        raise ConfigurationError(
            f"the cache cannot be read: {error}; ask whoever it belongs to, or give another with paths.cache=<folder>."
        ) from error
    except Exception as error:  # whatever it is that damaged files make those raise who read them
        return first_line(error)
    return None


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    stats = [path.stat() for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)]


def _require_whole(folder: Path, key: dict[str, Any], read: Callable[[Path], Any] | None) -> None:
    """Raise ValueError, or what reading its files raises, unless the entry is whole and of this key."""
    if json.loads((folder / KEY).read_text()) != json.loads(_as_json(key)):
        raise ValueError(f"{KEY} is that of another entry")
    if os.path.lexists(folder / DIGESTS):
        files = json.loads((folder / DIGESTS).read_text())["files"]
        if KEY not in files:
            raise ValueError(f"{DIGESTS} does not name the files")
        for name, wanted in files.items():
            if file_digest(folder / name) != wanted:
                raise ValueError(f"{name} has changed")
        return
    if read is not None:
        read(folder)
    with suppress(OSError):  # a cache that others look after
        _write_manifest(folder)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGESTS)
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    write_json(folder / DIGESTS, {"version": DIGESTS_VERSION, "files": digests})


def _acquire(lock: FileLock, folder: Path, fault: str) -> None:
    """Take the lock; say so if another process has it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if Path(lock.lock_file).is_dir():
            set_aside(Path(lock.lock_file))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process, which is making {folder}", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _unwritable(folder, fault, error) from error


def _make_room(folder: Path, fault: str, partial: Path, continues: str | None) -> None:
    """Set a damaged entry aside, and sweep what a dead process has left."""
    try:
        if os.path.lexists(folder):
            aside = set_aside(folder)
            print(f"the cache's {folder} is damaged ({fault}): set aside as {aside.name} and made again", flush=True)
        if os.path.lexists(partial) and not partial.is_dir():
            partial.unlink()
        partial.mkdir(exist_ok=True)
        for left in partial.iterdir():
            if left.name != continues or not left.is_dir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except OSError as error:
        raise _unwritable(folder, fault, error) from error


def _appear(partial: Path, folder: Path, key: dict[str, Any]) -> None:
    write_json(partial / KEY, key)
    _write_manifest(partial)
    os.replace(partial, folder)


def _unwritable(folder: Path, fault: str, error: Exception) -> ConfigurationError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return ConfigurationError(
        f"the cache cannot be written ({reason}), and {folder} would have to be made, for {fault}; give a folder that "
        "can be written with paths.cache=<folder>, or fill this one where it can."
    )


def set_aside(path: Path, name: Path | None = None) -> Path:
    """Rename what is damaged to `<name>.damaged-<n>`, to be looked at or deleted; `name`: by default its own."""
    name, number = name or path, 1
    while os.path.lexists(aside := name.with_name(f"{name.name}.damaged-{number}")):
        number += 1
    os.replace(path, aside)
    return aside


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either.

    JSON has no number for NaN and infinity: they become null.
    """
    with atomic(path) as temporary:
        temporary.write_text(_as_json(value, indent=2) + "\n")


def _as_json(value: Any, **more: Any) -> str:
    return json.dumps(_without_nan(value), allow_nan=False, **more)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


class atomic:
    """`with atomic(path) as temporary:` write to `temporary`, a file or a folder; it becomes `path` only if the block
    succeeds, and only when it is on the disk, so that a power cut leaves the old or the new one.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: Any) -> None:
        if error is None:
            inside = self.temporary.rglob("*") if self.temporary.is_dir() else [self.temporary]
            for file in inside:
                if file.is_file():
                    _flush(file)
            if self.path.is_dir():  # a folder cannot be replaced in one go; two renames are the next best
                old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent))
                os.replace(self.path, old)
                os.replace(self.temporary, self.path)
                shutil.rmtree(old)
            else:
                os.replace(self.temporary, self.path)
            if os.name == "posix":  # elsewhere a folder cannot be opened
                _flush(self.path.parent)
            return
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.temporary.unlink(missing_ok=True)
        with writing(self.path):
            raise error


def _flush(path: Path) -> None:
    """Wait until the file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # a file system that cannot
        os.fsync(descriptor)
    os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what `atomic` has left in a folder and those in it, when a process died within.

    For whoever owns the folder, so that no living process is at it.
    """
    for pattern in (".*.tmp", "*/.*.tmp"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

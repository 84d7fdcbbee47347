"""What is expensive is made once: base models, oracles and classifiers, in folders named by a hash."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from unlearn_runner.distributed import first_only, from_first, own_copy


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def cached(root: Path, kind: str, key: dict[str, Any], make: Callable[[Path], None], together: bool = False) -> Path:
    """The folder `<root>/<kind>/<hash of key>`, filled by `make(<folder>.partial)` if it is not there yet.

    A lock lets one of several parallel jobs make it while the others wait. The folder appears by a rename
    when `make` has returned, so what is found there is whole. What an interrupted `make` left in
    `<folder>.partial` is handed to the next one, which may continue from it.

    Of several processes of one job the first makes it and the others wait, or, `together`, all take part and what the
    first has written counts.
    """
    folder = Path(root) / kind / fingerprint(key)
    if together:
        _fill(folder, key, make)
    else:
        from_first(lambda: _fill(folder, key, make))
    return folder


def _fill(folder: Path, key: dict[str, Any], make: Callable[[Path], None]) -> None:
    if from_first(folder.exists):
        return
    partial = folder.with_suffix(".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with first_only(FileLock(f"{folder}.lock")):
        if not from_first(folder.exists):
            from_first(lambda: partial.mkdir(exist_ok=True))
            with own_copy(partial) as place:
                make(place)
            from_first(lambda: _appear(partial, folder, key))


def _appear(partial: Path, folder: Path, key: dict[str, Any]) -> None:
    write_json(partial / "key.json", key)
    os.replace(partial, folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


class atomic:
    """`with atomic(path) as temporary:` write to `temporary`; it becomes `path` only if the block succeeds."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            os.replace(self.temporary, self.path)
        elif self.temporary.is_dir():
            shutil.rmtree(self.temporary)
        else:
            self.temporary.unlink(missing_ok=True)

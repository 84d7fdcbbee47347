"""The files of a run folder: their versions (docs/metrics.md), and how much is read of others'. Imports nothing heavy:
readers of runs start at once.

A version goes up when a reader of the older one would misread the newer; new keys alone do not raise it.
"""

import hashlib
import stat
from pathlib import Path

import yaml

SUMMARY_VERSION = 2  # 2: provenance.evaluation.data, the name and the fingerprint of the dataset
METRICS_VERSION = 2  # 2: the file begins with a line {"step": 0, "version": 2}; before, no line had a version

# libyaml's parser reads a config in 3 ms, the one in Python takes ten times as long.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Bounds of what is read of others' folders: bytes of a file, values of a config.yaml with its aliases written out.
LARGEST = {"summary.json": 50_000_000, "config.yaml": 2_000_000, "metrics.jsonl": 1_000_000_000}
MOST_VALUES = 100_000


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def bounded_text(path: Path) -> str:
    """A file's text. Raises OSError, or ValueError for what is no file, is too large or no UTF-8."""
    found, most = path.stat(), LARGEST.get(path.name, LARGEST["config.yaml"])
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes, more than {most}")
    return path.read_text(encoding="utf-8")


def bounded_yaml(path: Path) -> str:
    """The same of a YAML file, whose aliases are bounded, too. Raises yaml.YAMLError where they cannot be counted."""
    text = bounded_text(path)
    require_few_values(text)
    return text


def require_few_values(text: str) -> None:
    """Raise ValueError if YAML's aliases make more than MOST_VALUES of few: a billion laughs in a kilobyte."""
    if "&" not in text:  # no anchor, no alias
        return
    values, sizes = 0, {}
    begun: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=YAML_LOADER):
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(event.anchor, MOST_VALUES + 1)  # inside itself it has no end
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, values))
            sizes.pop(event.anchor, None)
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes[anchor] = values - before
        if values > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")

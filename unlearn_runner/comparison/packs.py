"""Many runs in one file of Parquet: what compare.py reads of them, without pictures and models. Loads no torch.

A row is a run: `run`, its name; `config` and `summary`, the text of its config.yaml and summary.json; `log`, of its
metrics.jsonl, or null. Zstandard makes a tenth of them.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from unlearn_runner.comparison.runs import Run
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.schema import bounded_text, file_digest

SUFFIX = ".parquet"
FILES = {"config": "config.yaml", "summary": "summary.json", "log": "metrics.jsonl"}
MOST_RUNS = 100_000


def pack(runs: Sequence[Run], file: Path, logs: bool = True) -> None:
    """Write runs into one file; `logs`: with their lines on the way. Two of one name get numbers."""
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, str | None]] = []
    names: set[str] = set()
    for run in sorted(runs, key=lambda run: run.folder.name):
        own = (run.folder.name, *(f"{run.folder.name}-{number}" for number in range(2, len(runs) + 2)))
        name = next(name for name in own if name not in names)
        names.add(name)
        texts = {
            column: bounded_text(run.folder / part) if (run.folder / part).is_file() else None
            for column, part in FILES.items()
            if logs or column != "log"
        }
        rows.append({"run": name, "log": None} | texts)
    kinds = pyarrow.schema([(column, pyarrow.string()) for column in ("run", *FILES)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, kinds), file, compression="zstd", compression_level=19)


def unpacked(file: Path) -> Path:
    """The folder with the run folders of a pack, in the cache; made if it is not there.

    Raises ConfigurationError for what is no pack.
    """
    cache = Path(os.environ.get("UNLEARN_RUNNER_CACHE", "~/.cache/unlearn_runner")).expanduser()
    folder = cache / "packs" / file_digest(file)[:16] / file.stem
    if not folder.is_dir():
        runs = list(runs_in(file))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            whole = Path(scratch) / "whole"
            for name, texts in runs:
                (whole / name).mkdir(parents=True)
                for part, text in texts.items():
                    (whole / name / part).write_text(text, encoding="utf-8")
            with suppress(OSError):  # another process was faster
                whole.rename(folder)
    return folder


def runs_in(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Of each run in a pack its name, and the texts of its files by their names. Raises ConfigurationError as above."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file, columns=["run", *FILES]).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        why = first_line(error).rstrip(".")
        raise ConfigurationError(f"{file}: expected a file of runs as --pack writes it; {why}.") from error
    if len(rows) > MOST_RUNS:
        raise ConfigurationError(f"{file}: {len(rows)} runs are more than {MOST_RUNS}.")
    for row in rows:
        name = row["run"]
        if not name or Path(name).name != name or name.startswith("."):
            raise ConfigurationError(f"{file}: a run in it has the name {name!r}, which is none of a folder.")
        yield name, {part: row[column] for column, part in FILES.items() if row[column] is not None}


def with_packs(places: Iterable[Path]) -> list[Path]:
    """The places to look for runs in: for a pack, and for each pack right in a folder, the folder of its runs, too."""
    found: list[Path] = []
    for place in places:
        if place.is_file() and place.suffix == SUFFIX:
            found.append(unpacked(place))
            continue
        packs = [unpacked(file) for file in sorted(place.glob(f"*{SUFFIX}"))] if place.is_dir() else []
        found += packs or [place]
    return found

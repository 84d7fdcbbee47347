"""Deletion requests to one model, one after the other: each begins with what the last one left, and after each all of
them are measured again, beside the model before the first.

    python scripts/ledger.py <folder>                    # does what <folder>/requests.yaml asks and is not done yet
    python scripts/ledger.py <folder> hardware=single_gpu    # with overrides of train.py for all runs

    # requests.yaml
    base: auto                  # or a folder or hub id; auto: the first request's run trains it
    overrides: [method=posterior, evaluation/relearning=benign]   # of every request
    requests:
      - {id: trousers, overrides: [dataset=digits_trousers], text: "No more trousers", received: 2026-11-02}
      - {id: seven, overrides: [dataset=digits, dataset.forget_class=7]}

A request that comes later is added at the end; the same command then does it alone. `ledger.json`, `ledger.png` and the
table at the end say after each request how much of it and of all before it is left, and what else the model can.
`scripts/report.py <folder>` writes the pages. --dry-run prints the commands only."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unlearn_runner.api import option
from unlearn_runner.comparison.ledger import (
    BASE,
    LEDGER,
    REQUESTS,
    Requests,
    draw,
    finished,
    folder_of,
    ledger_of,
    measurements_of,
    read_requests,
    table_of,
)
from unlearn_runner.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("method", "budget", "trainer", "label", "model.weights")  # what a measurement has of its own


def commands(folder: Path, asked: Requests, more: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """The folder and the words of each run that is not done yet, in order.

    Raises ConfigurationError if a request that is done was another one then.
    """
    base = str(folder / BASE / "model") if asked.base == "auto" else asked.base
    before = base
    for number, request in enumerate(asked.requests, 1):
        run = folder_of(folder, number, request)
        own = [*asked.overrides, *request.overrides, *more]
        first = number == 1 and asked.base == "auto"
        words = [*own, *([] if first else [option("model.weights", before)]), option("label", request.id)]
        if finished(run) is None:
            yield run, words
        elif (was := (run / "request.json")).is_file() and json.loads(was.read_text()) != list(request.overrides):
            raise ConfigurationError(
                f"{folder / REQUESTS}: request '{request.id}' is done, and its overrides were others then: "
                f"{' '.join(json.loads(was.read_text()))}; add a new request at the end."
            )
        before = str(run / "model")
        for place, earlier in zip(measurements_of(folder, asked, number), asked.requests, strict=False):
            if finished(place) is None:
                shared = (*asked.overrides, *earlier.overrides, *more)
                measured = [word for word in shared if not is_of_method(word)]
                weights = (option("method.weights", before), option("model.weights", base))
                yield place, ["method=given", *measured, *weights, option("label", f"{earlier.id} after {request.id}")]


def is_of_method(word: str) -> bool:
    """Whether an override is about how to forget, not about what and how it is measured."""
    key = word.partition("=")[0].lstrip("+~")
    return any(key == part or key.startswith((f"{part}.", f"{part}/")) for part in METHOD)


def keep_base(folder: Path, run: Path) -> None:
    """The base that the first run trained, beside the runs: a cache may be emptied."""
    place = (finished(run) or {}).get("identity", {}).get("base_folder")
    if place is None or not Path(place).is_dir():
        raise ConfigurationError(f"{run}: the base that this run trained is no longer in the cache; remove the folder.")
    shutil.copytree(place, folder / BASE / "model")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"with {REQUESTS} in it")
    parser.add_argument("overrides", nargs="*", help="of train.py, for all runs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse_args(arguments)
    try:
        return carry_out(asked.folder, asked.overrides, asked.dry_run)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1


def carry_out(folder: Path, more: Sequence[str], dry_run: bool) -> int:
    asked = read_requests(folder)
    if wrong := [word for word in more if "=" not in word]:
        raise ConfigurationError(f"'{wrong[0]}': expected an override of train.py, as in hardware=cpu.")
    overrides = {folder_of(folder, number, one): one.overrides for number, one in enumerate(asked.requests, 1)}
    for run, words in commands(folder, asked, more):
        if not dry_run and asked.base == "auto" and not (folder / BASE).is_dir() and run not in overrides:
            keep_base(folder, folder_of(folder, 1, asked.requests[0]))
        line = [sys.executable, str(ROOT / "train.py"), *words, option("hydra.run.dir", str(run))]
        print(shlex.join(line), flush=True)
        if dry_run:
            continue
        if code := subprocess.run(line).returncode:
            return code
        if run in overrides:
            (run / "request.json").write_text(json.dumps(overrides[run]))
    if dry_run:
        return 0
    ledger = ledger_of(folder)
    (folder / LEDGER).write_text(json.dumps(ledger, indent=1, ensure_ascii=False), encoding="utf-8")
    draw(ledger, folder / "ledger.png")
    head, *rows = table_of(ledger)
    table = Table(*head, title="How much of each request is left, and what is kept")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for request in ledger["broken"]:
        print(f"WARNING: {request} did not begin with the model that the request before it left.")
    print(f"Everything is in {folder}: {LEDGER}, ledger.png and a folder for each request.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

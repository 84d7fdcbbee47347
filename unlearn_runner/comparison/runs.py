"""Reads run folders: what each measured, under which settings, and what is wrong with the others. Loads no torch."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unlearn_runner.errors import first_line, plain
from unlearn_runner.options import TUNING
from unlearn_runner.owner import owner_of
from unlearn_runner.schema import SUMMARY_VERSION, YAML_LOADER, bounded_text, bounded_yaml

NO_FACT = ("weights", *TUNING)  # of a network, what leaves the base as it is
# Of provenance.evaluation: what took how long, how intervals within one run were made, which rows of the pictures are
# which, change no score.
NO_SCORE = ("seconds", "bootstrap", "forget_rows", "row_titles")


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    label: str  # its row: the method's name, if no label was set
    method: str
    seed: int
    metrics: dict[str, float]  # finite ones
    facts: dict[str, Any]  # flat: what another run must share to stand in one table with it
    settings: dict[str, Any]  # flat: the method's own, seeds and places apart
    environment: dict[str, Any]  # flat: versions, machine, commit
    oracles: dict[str, dict[str, float]]  # finite scores of each model that never saw the forget set, by its digest
    version: int  # of its summary
    written: float  # when, in seconds since 1970
    forget_rows: list[int] | None  # of its pictures, those drawn under the forget conditions; None: it does not tell
    row_titles: list[str]  # of its pictures' rows, the conditions that they are drawn under; it may tell none


class SkippedRun(NamedTuple):
    """A run that stands in no table."""

    folder: Path
    why: str


class RunsRead(NamedTuple):
    runs: list[Run]
    apart: list[SkippedRun]
    remarks: list[str]  # a sentence each: what was left out of runs that are shown


def read_runs(folders: list[Path]) -> RunsRead:
    """All runs at or below the folders, the oldest first."""
    runs: list[Run] = []
    apart: list[SkippedRun] = []
    remarks: list[str] = []
    seen: set[Path] = set()
    for top in folders:
        unreadable: list[OSError] = []
        below = list(run_folders(top, unreadable.append))
        remarks += [f"{error.filename} cannot be read: {error.strerror}." for error in unreadable]
        if not below:
            remarks.append(f"{top}: no run in there (a run has a summary.json).")
        for folder in below:
            if (place := folder.resolve()) in seen:
                continue
            seen.add(place)
            found = read_run(folder)
            if isinstance(found, SkippedRun):
                apart.append(found)
                continue
            run, dropped = found
            runs.append(run)
            if dropped:
                remarks.append(f"{folder}: left out, for they are no finite numbers: {', '.join(dropped)}.")
    versions = Counter(run.version for run in runs)
    newer = {version: count for version, count in versions.items() if version > SUMMARY_VERSION}
    if newer:
        remarks.append(
            f"{sum(newer.values())} summaries have version {max(newer)}, this compare.py knows {SUMMARY_VERSION}: "
            "shown as far as it understands them; a newer unlearn_runner reads them all."
        )
    elif len(versions) > 1:
        named = ", ".join(f"{count} of version {version}" for version, count in sorted(versions.items()))
        remarks.append(f"summaries of several versions are shown together ({named}); an older one says less.")
    return RunsRead(sorted(runs, key=lambda run: run.written), apart, remarks)


def run_folders(top: Path, say: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Folders with a summary.json, or with the lines of a run that lost it, in alphabetical order.

    `say` gets a line for each folder that cannot be read.
    """
    for folder, inner, files in os.walk(top, onerror=say):
        if "summary.json" in files or ("metrics.jsonl" in files and "config.yaml" in files):
            inner.clear()  # a run has no runs inside, but many files
            yield Path(folder)
        inner.sort()


def read_run(folder: Path) -> tuple[Run, list[str]] | SkippedRun:
    """A finished run with the keys of its metrics that are no finite numbers; else why it stands apart."""
    path = folder / "summary.json"
    try:
        summary = json.loads(bounded_text(path))
        written = path.stat().st_mtime
    except FileNotFoundError:
        return SkippedRun(folder, "there is no summary.json")
    except (OSError, ValueError, RecursionError) as error:
        return SkippedRun(folder, f"summary.json is unreadable, perhaps half-written: {first_line(error)}")
    try:
        text = bounded_yaml(folder / "config.yaml")
        config = yaml.load(text, Loader=YAML_LOADER)
    except Exception as error:  # OSError, YAMLError, and what its constructors raise for odd dates, keys and numbers
        return SkippedRun(folder, f"config.yaml is unreadable: {first_line(error)}")
    try:
        label, method, seed = (
            config.get("label") or config["choices"]["method"],
            config["choices"]["method"],
            config["seed"],
        )
        label, method = one_line(label), one_line(method)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed {seed} is no whole number")
        if summary["status"] != "finished":
            dead = summary["status"] == "running" and owner_of(folder) is None
            why = error_of(summary) or (": its process is gone, it was killed" if dead else "")
            return SkippedRun(folder, f"{one_line(summary['status'])} ({label}, seed {seed})" + why)
        version = summary.get("version", 1)
        numbers = numbers_of(summary)
        provenance = summary["provenance"]
        run = Run(
            folder=folder,
            label=label,
            method=method,
            seed=seed,
            metrics=finite(numbers),
            facts=facts_of(config, provenance["evaluation"]),
            settings=settings_of(config.get("method") or {}) | tuning_of(config),
            environment=flat(provenance.get("environment") or {}),
            oracles={one_line(oracle["digest"]): finite(numbers_of(oracle)) for oracle in summary.get("oracles") or []},
            version=version if isinstance(version, int) else 1,
            written=written,
            forget_rows=rows_named(provenance["evaluation"].get("forget_rows")),
            row_titles=titles_in(provenance["evaluation"].get("row_titles")),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is not as expected: {first_line(error)}"
        return SkippedRun(folder, f"summary.json or config.yaml {what}")
    return run, [key for key, value in numbers.items() if value is None]


def rows_named(value: Any) -> list[int] | None:
    """A list of row numbers, or None."""
    fine = isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)
    return value if fine and value else None


def titles_in(value: Any) -> list[str]:
    """A list of texts, each as one line."""
    return [one_line(title) for title in value] if isinstance(value, list) else []


def one_line(value: Any) -> str:
    """A name of others as one line without control characters."""
    return " ".join(plain(str(value)).split())


def error_of(summary: dict[str, Any]) -> str:
    """What ended the run, if it says so."""
    return (
        f": {plain(str(summary['error']).strip()).splitlines()[0]}" if str(summary.get("error") or "").strip() else ""
    )


def numbers_of(scored: dict[str, Any]) -> dict[str, float | None]:
    """The metrics of a summary, or of one of its oracles."""
    return {one_line(key): as_number(value) for key, value in scored["metrics"].items()}


def finite(numbers: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if value is not None}


def as_number(value: Any) -> float | None:
    """A finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None  # of numbers beyond that there are no means, no squares and no columns
    return float(value)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys joined by dots; all but numbers and null becomes text of one line, so that it can be compared and hashed."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            same = value is None or (isinstance(value, int | float) and value == value)
            text = value if isinstance(value, str) else repr(value)
            result[one_line(f"{prefix}{key}")] = value if same else one_line(text)
    return result


def facts_of(config: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """How a run was measured, on which data, from which base and with how much training."""
    choices, plan = config["choices"], config.get("trainer") or {}
    if plan.get("init") == "scratch":  # retraining, the oracle as a method, has the base's own budget
        plan = config.get("budget") or {}
    model = config.get("model") or {}
    clip, no_score = config.get("clip") or {}, NO_SCORE
    trained_here = "clip_digest" in evaluation and clip.get("training")
    if trained_here:  # its recipe says what it is: each seed trains its own
        no_score = (*no_score, "clip_digest")
    facts = flat(
        {
            "dataset": choices.get("dataset"),
            "model": choices.get("model"),
            "steps": plan.get("max_steps"),
            "batch_size": plan.get("batch_size"),
            **{f"model.{key}": value for key, value in flat(model.get("network") or {}).items() if key not in NO_FACT},
            **{f"base training.{key}": value for key, value in settings_of(model.get("pretraining") or {}).items()},
            **{f"clip.{key}": value for key, value in (settings_of(clip) if trained_here else {}).items()},
            **{
                f"evaluation.{key}": value
                for key, value in flat({key: part for key, part in evaluation.items() if key not in no_score}).items()
            },
        }
    )
    return {key: value for key, value in facts.items() if value is not None}


def tuning_of(config: dict[str, Any]) -> dict[str, Any]:
    """Which of the network's weights the method moves: a setting of its own, where a model leaves the choice."""
    network = flat((config.get("model") or {}).get("network") or {})
    keys = ("trainable", "lora_rank") if network.get("trainable") == "lora" else ("trainable",)
    return {f"model.{key}": network[key] for key in keys if key in network}


def settings_of(part: dict[str, Any]) -> dict[str, Any]:
    """A part's settings but for seeds and for places, which differ between runs of one setting."""
    return {
        key: value
        for key, value in flat(part).items()
        if key.rpartition(".")[2] != "seed" and not (isinstance(value, str) and os.sep in value)
    }

"""Curves out of metrics.jsonl, thinned to what a screen can show."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearn_runner.comparison.columns import counted_of
from unlearn_runner.comparison.runs import Run
from unlearn_runner.errors import first_line
from unlearn_runner.schema import LARGEST

Points = tuple[np.ndarray, np.ndarray]  # steps, values


class Lines(NamedTuple):
    """A metrics.jsonl by columns."""

    series: dict[str, Points]
    corrupt: int  # lines that are no JSON object of numbers


class Curve(NamedTuple):
    """A metric of the runs of one label; over the seeds the mean, the lowest and the highest."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_lines(path: Path) -> Lines:
    """Every key's values by step; nothing for a file that is not there.

    Looks on the way (`eval/...`) measure less than the final evaluation: of each key only the lines that measured the
    same as its first are kept, so that a curve does not end in another number of samples. Shares of samples are the
    same on average whatever the number of samples: their curves begin with the base's and end with the final one.
    """
    tables: dict[tuple[str, ...], list[list[Any]]] = {}
    lines, corrupt = parsed(path)
    for line in lines:
        tables.setdefault(tuple(line), []).append(list(line.values()))
    parts: dict[str, list[Points]] = {}
    measured: dict[str, frozenset[str]] = {}
    for keys, rows in tables.items():
        if "step" not in keys:
            corrupt += len(rows)
            continue
        try:
            values = np.array(rows, dtype=float)
            if values.ndim != 2:
                raise ValueError("lists among the numbers")
        except (ValueError, TypeError, OverflowError):  # a line with a text, a null or too large a number among numbers
            good = [row for row in rows if all(isinstance(value, int | float) and is_float(value) for value in row)]
            corrupt += len(rows) - len(good)
            values = np.array(good, dtype=float).reshape(-1, len(keys))
        steps, scores = values[:, keys.index("step")], frozenset(key for key in keys if key.startswith("eval/"))
        for place, key in enumerate(keys):
            whole = is_share(key)
            if key == "step" or (key in scores and not whole and measured.setdefault(key, scores) != scores):
                continue
            finite = np.isfinite(values[:, place]) & np.isfinite(steps)
            part = (steps[finite], values[finite, place])
            parts.setdefault(key, []).append(part)
            if whole and key.startswith("base/"):
                parts.setdefault(key.replace("base/", "eval/", 1), []).append(part)
    return Lines({key: in_order(found, is_share(key)) for key, found in parts.items()}, corrupt)


def is_share(key: str) -> bool:
    """Whether a key of the file is a share of samples."""
    return key.startswith(("base/", "eval/")) and counted_of(key.partition("/")[2]) is not None


def parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects, and how many others there are; none for a file that is not there."""
    if not path.is_file():
        return [], 0
    if path.stat().st_size > LARGEST[path.name]:
        raise ValueError(f"it has more than {LARGEST[path.name]} bytes")
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    try:
        values = json.loads(f"[{','.join(texts)}]")  # at once: faster than line by line
    except (ValueError, RecursionError):
        values = [value_of(text) for text in texts]
    lines = [value for value in values if isinstance(value, dict)]
    return lines, max(0, len(texts) - len(lines))


def value_of(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_float(value: int | float) -> bool:
    """Whether a number is one of floating point's, which whole numbers of JSON need not be; NaN and infinity are."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def in_order(parts: list[Points], once: bool) -> Points:
    """All points by step; `once`: of each step only the last."""
    steps, values = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True) if once and len(steps) else slice(None)
    return steps[last], values[last]


def curve_of(seeds: list[Points], most: int) -> Curve:
    """Values at each step; of more than `most` steps the means of neighbours."""
    steps = np.unique(np.concatenate([points[0] for points in seeds]))
    size = max(1, math.ceil(len(steps) / most))
    bins = math.ceil(len(steps) / size)
    means = np.full((len(seeds), bins), np.nan)
    for row, (at, values) in zip(means, seeds, strict=True):
        place = np.searchsorted(steps, at) // size
        count = np.bincount(place, minlength=bins)
        there = count > 0
        row[there] = np.bincount(place, values, bins)[there] / count[there]
    starts = np.arange(0, len(steps), size)
    middle = np.add.reduceat(steps, starts) / np.diff(np.append(starts, len(steps)))
    ends = (np.nanmean(means, 0), np.nanmin(means, 0), np.nanmax(means, 0))
    return Curve(middle.tolist(), *(end.tolist() for end in ends))


def curves_by_label(
    runs: list[Run], most: int, keys: set[str] | None = None
) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """The curves of each label by key, None: of all keys; and a sentence for each file with corrupt lines."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    curves: dict[str, dict[str, Curve]] = {}
    remarks: list[str] = []
    for label, same in by_label.items():  # one label at a time: what was read of the others is no longer held
        found: dict[str, list[Points]] = {}
        for run in same:
            path = run.folder / "metrics.jsonl"
            try:
                lines = read_lines(path)
            except (OSError, ValueError) as error:
                remarks.append(f"{path} is not read: {first_line(error)}.")
                continue
            if lines.corrupt:
                remarks.append(f"{path}: {lines.corrupt} corrupt lines are skipped.")
            for key, points in lines.series.items():
                if (keys is None or key in keys) and len(points[0]):
                    found.setdefault(key, []).append(points)
        if found:
            curves[label] = {key: curve_of(seeds, most) for key, seeds in found.items()}
    return curves, remarks

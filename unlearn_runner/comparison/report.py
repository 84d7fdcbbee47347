"""The comparison as one page that needs no network: tables and pictures of the samples in HTML, plots by its script."""

import json
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlearn_runner.comparison.columns import better
from unlearn_runner.comparison.comparison import Comparison, Table, Wanted
from unlearn_runner.comparison.curves import Curve, curves_by_label
from unlearn_runner.comparison.pictures import as_data_uri
from unlearn_runner.comparison.render import arrow, difference, p_value
from unlearn_runner.comparison.runs import Run
from unlearn_runner.comparison.statistics import TESTS
from unlearn_runner.comparison.tables import Cell, readable, text
from unlearn_runner.comparison.tradeoff import FORGETTING, RETENTION, tradeoffs_of
from unlearn_runner.comparison.verdicts import listed, sentence, verdicts_of

NUMBERS = 1_000_000  # of all curves of a page, about 6 bytes each
POINTS = (20, 120)  # of one curve, at least and at most
KEYS = 24  # of curves, at most
PICTURES = 6_000_000  # bytes of all samples of a page
PICTURE_COLUMNS = 8
WIDEST = 480  # pixels of a grid's first columns

COSTS = (
    "cost/seconds", "cost/network_evaluations", "cost/images", "cost/peak_memory_gb",
    "cost/network_evaluations_per_sample", "cost/policy_network_evaluations",
)  # fmt: skip
CURVES = ("eval/", "loss/", "lambda/", "grad_norm/", "weights/", "")  # which come first
NO_CURVES = ("base/", "oracle/", "oracle_gap/", "reached/", "lambda/at/")
NO_CURVE_OF = ("step", "seconds", "images", "version", "eval/deletion_steps", "eval/lasting_deletion_steps")
DETAILS = ("per_class/", "per_timestep/", "per_step/")


def report(comparison: Comparison, wanted: Wanted) -> tuple[str, list[str]]:
    """The page, and a sentence for what had to be left out of it."""
    remarks: list[str] = []
    most_runs = max(len(table.runs) for table in comparison.tables)
    tables = []
    for number, table in enumerate(comparison.tables):
        curves, more = thinned_curves(comparison, table)
        remarks += more
        share = PICTURES * len(table.runs) // max(1, sum(len(each.runs) for each in comparison.tables))
        samples, left_out = samples_of(table, share)
        tables.append(
            {
                "id": f"t{number}",
                "title": table.title or title_of(table),
                "cards": cards_of(table, wanted.test),
                "columns": [column_of(column, column in table.asked) for column in table.columns],
                "rows": [row_of(table, place) for place in range(len(table.rows))],
                "seeds": sorted({run.seed for run in table.runs}),
                "num_runs": len(table.runs),
                "num_methods": sum(row.is_method for row in table.rows),
                "remarks": table.remarks,
                "samples": samples,
                "samples_left_out": left_out,
                "tests": tests_of(table),
                "facts": facts_of(table),
                "runs": [run_line(run) for run in table.runs],
                "data": plotted(table, curves),
            }
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(part("report.html.jinja")).render(
        tables=tables,
        apart=[{"folder": str(run.folder), "why": run.why} for run in comparison.apart],
        remarks=[*comparison.remarks, *remarks],
        style=Markup(part("report.css")),
        script=Markup(part("report.js")),
        test=TESTS[wanted.test],
        baseline=wanted.baseline,
        open_runs=most_runs <= 12,
        as_json=as_json,
        breakable=breakable,
        listed=listed,
    )
    return page, remarks


def part(name: str) -> str:
    return (files("unlearn_runner.comparison") / "page" / name).read_text(encoding="utf-8")


def as_json(value: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def breakable(name: str) -> Markup:
    """A long name may be broken after each "_" and "/"."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/])", name))


def title_of(table: Table) -> str:
    """The dataset, for a table that nothing else has to be told from."""
    return str(table.runs[0].facts.get("dataset", "runs"))


def column_of(column: str, headline: bool) -> dict[str, Any]:
    """`headline`: whether it is shown before a person asks for all."""
    direction = better(column)
    return {
        "name": column,
        "arrow": arrow(column),
        "better": "" if direction is None else str(direction),
        "headline": headline,
    }


def row_of(table: Table, place: int) -> dict[str, Any]:
    row, cells = table.rows[place], table.cells[place]
    return {
        "label": row.label,
        "is_method": row.is_method,
        "n": len(row.seeds),
        "cells": [cell_of(cells.get(column)) for column in table.columns],
    }


def cell_of(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else {"value": cell.mean, "text": text(cell), "best": cell.best}


def cards_of(table: Table, test: str) -> list[dict[str, str]]:
    """Who is best at what."""
    by_label = {row.label: cells for row, cells in zip(table.rows, table.cells, strict=True) if row.is_method}
    cards = []
    for verdict in verdicts_of(table.rows, test):
        if verdict.column in by_label[verdict.label]:
            names = [verdict.label, *verdict.equal]
            cards.append(
                {
                    "question": verdict.question,
                    "label": listed(names, 2),
                    "value": f"{verdict.column} {text(by_label[verdict.label][verdict.column])}",
                    "sentence": sentence(verdict._replace(equal=[])),
                }
            )
    return cards


def tests_of(table: Table) -> dict[str, Any] | None:
    """The paired tests as texts."""
    if not table.tests:
        return None
    columns = [column for column in table.asked if any(column in found for found in table.tests.values())]
    rows = []
    for label, found in table.tests.items():
        cells = []
        for column in columns:
            result = found.get(column)
            cells.append(
                None
                if result is None
                else {
                    "difference": difference(result),
                    "p": p_value(result),
                    "n": result.n,
                    "real": result.adjusted is not None and result.adjusted < 0.05,
                }
            )
        rows.append({"label": label, "cells": cells})
    return {"columns": columns, "rows": rows}


def facts_of(table: Table) -> list[tuple[str, str]]:
    """What all runs of a table share, and with which software they were made."""
    shared: dict[str, Any] = {}
    for run in table.runs:
        shared |= run.facts
    facts = [(readable(key), str(value)) for key, value in shared.items()]
    keys = dict.fromkeys(key for run in table.runs for key in run.environment)
    for key in keys:
        values = dict.fromkeys(str(run.environment[key]) for run in table.runs if key in run.environment)
        facts.append((readable(key.removeprefix("packages.")), ", ".join(values)))
    return facts


def run_line(run: Run) -> dict[str, Any]:
    return {"label": run.label, "seed": run.seed, "folder": str(run.folder), "command": command_of(run.folder)}


def command_of(folder: Path) -> str:
    """What makes a run again, from the checkout's root: Hydra takes a relative folder from where train.py lies."""
    place, root = Path(os.path.abspath(folder)), Path(__file__).parents[2]
    if (root / "train.py").is_file() and place.is_relative_to(root):
        place = place.relative_to(root)
    return f"python train.py --config-path {shlex.quote(str(place))} --config-name config"


def samples_of(table: Table, most_bytes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Grids of base, oracle and methods of one seed where it has them; and the labels for which there was no room.

    One seed, because the seeds may have bases of their own; the noise is that of evaluation.seed, the same for all.
    """
    with_samples: dict[int, list[Run]] = {}
    for run in table.runs:
        if (run.folder / "samples" / "after.png").is_file():
            with_samples.setdefault(run.seed, []).append(run)
    if not with_samples:
        return [], []
    seed = max(sorted(with_samples), key=lambda seed: len(with_samples[seed]))
    at_seed = {run.label: run for run in with_samples[seed]}
    others = {run.label: run for runs in with_samples.values() for run in runs}
    wanted: list[tuple[str, int, Path]] = []
    for title, name in (("before", "before"), ("oracle", "oracle")):
        paths = [run.folder / "samples" / f"{name}.png" for run in at_seed.values()]
        wanted += [(title, seed, path) for path in paths if path.is_file()][:1]
    for row in table.rows:
        if row.is_method and (run := at_seed.get(row.label) or others.get(row.label)):
            wanted.append((row.label, run.seed, run.folder / "samples" / "after.png"))
    samples, left_out, spent = [], [], 0
    for title, at, path in wanted:
        try:
            uri = as_data_uri(path, PICTURE_COLUMNS, WIDEST) if spent < most_bytes else ""
        except OSError:  # a picture cut off by a full disk; the others are still worth looking at
            uri = ""
        spent += len(uri)
        if uri:
            is_method = title not in ("before", "oracle") or "after" in path.name
            samples.append({"title": title, "seed": at, "uri": uri, "is_method": is_method, "same_base": at == seed})
        else:
            left_out.append(title)
    return samples, left_out


def thinned_curves(comparison: Comparison, table: Table) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """All curves of a table, with as many points as keep the page small."""
    labels = sum(row.is_method for each in comparison.tables for row in each.rows)
    several = 3 if any(len(row.seeds) > 1 for row in table.rows if row.is_method) else 1  # a mean, or a band with it
    least, most = POINTS
    return curves_by_label(table.runs, min(most, max(least, NUMBERS // (labels * KEYS * several))))


def plotted(table: Table, curves: dict[str, dict[str, Curve]]) -> dict[str, Any]:
    """What the page's script draws."""
    methods = [row.label for row in table.rows if row.is_method]
    place = {label: number for number, label in enumerate(methods)}
    cells = {row.label: found for row, found in zip(table.rows, table.cells, strict=True) if row.is_method}
    references = {row.label: found for row, found in zip(table.rows, table.cells, strict=True) if not row.is_method}
    known = {cell for row in table.cells for cell in row}
    scatter = [column for column in (*FORGETTING, *RETENTION) if column in known]
    costs = [column for column in COSTS if column in known]

    def pairs(found: dict[str, Cell], columns: list[str]) -> dict[str, list[float | int | None]]:
        return {
            column: [short(found[column].mean), short(found[column].half_width)]
            for column in columns
            if column in found
        }

    keys = curve_keys(curves)
    return {
        "methods": [{"label": label, "cells": pairs(cells[label], [*scatter, *costs])} for label in methods],
        "references": [{"label": label, "cells": pairs(found, scatter)} for label, found in references.items()],
        "better": {column: str(better(column)) for column in [*scatter, *costs]},
        "tradeoffs": [
            {
                "x": found.forgetting,
                "y": found.retention,
                "front": [place[label] for label in found.front],
                "hypervolume": short(found.hypervolume),
                "half": short(found.half_width),
                "worst": short(found.worst),
            }
            for found in tradeoffs_of(table.rows)
            if {found.forgetting, found.retention} <= known
        ],
        "costs": costs,
        "keys": keys,
        "curves": [series_of(curves.get(label, {}), keys) for label in methods],
    }


def curve_keys(curves: dict[str, dict[str, Curve]]) -> list[str]:
    """The metrics to choose from: those of most labels where there are too many, forgetting first."""
    counts: dict[str, int] = {}
    for by_key in curves.values():
        for key, curve in by_key.items():
            usual = not key.startswith(NO_CURVES) and not any(detail in key for detail in DETAILS)
            if usual and key not in NO_CURVE_OF and len(curve.steps) > 1:
                counts[key] = counts.get(key, 0) + 1
    kept = sorted(counts, key=lambda key: -counts[key])[:KEYS]
    return sorted(kept, key=lambda key: next(n for n, prefix in enumerate(CURVES) if key.startswith(prefix)))


def series_of(by_key: dict[str, Curve], keys: list[str]) -> dict[str, Any]:
    """The curves of one label: x axes, and for each key its axis, mean, lowest and highest (where they differ)."""
    axes: list[dict[str, list[Any]]] = []
    places: dict[tuple[float, ...], int] = {}
    series: dict[str, list[Any]] = {}
    for key in keys:
        if (curve := by_key.get(key)) is None:
            continue
        steps = tuple(curve.steps)
        if steps not in places:
            places[steps] = len(axes)
            axis = {"steps": [short(step) for step in steps]}
            for name in ("seconds", "images"):
                if clock := by_key.get(name):
                    axis[name] = [short(value) for value in np.interp(steps, clock.steps, clock.mean)]
            axes.append(axis)
        values = [[short(value) for value in side] for side in (curve.mean, curve.low, curve.high)]
        series[key] = [places[steps], values[0], *(values[1:] if values[1] != values[2] else ())]
    return {"axes": axes, "series": series}


def short(value: Any) -> float | int | None:
    """Four significant digits, without a point where there is none to see; whole numbers whole."""
    if value is None:
        return None
    value = float(value)
    if value.is_integer() and abs(value) < 1e9:
        return int(value)
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded

"""The comparison as one page that needs no network: tables and pictures of the samples in HTML, plots by its script."""

import json
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlearn_runner.comparison.comparison import Comparison, Table, Wanted
from unlearn_runner.comparison.pictures import PICTURES, samples_of
from unlearn_runner.comparison.plots import plotted, thinned_curves
from unlearn_runner.comparison.render import INTERVALS, WAYS, arrow, difference, p_value
from unlearn_runner.comparison.runs import Run
from unlearn_runner.comparison.statistics import TESTS
from unlearn_runner.comparison.tables import (
    BASE,
    Cell,
    Row,
    badness,
    interval_text,
    number,
    readable,
    seeds_text,
    text,
    way_of,
    z_text,
)
from unlearn_runner.comparison.tradeoff import FORGETTING_AXIS
from unlearn_runner.comparison.verdicts import listed, measured_by, rules_of, sentence


def report(comparison: Comparison, wanted: Wanted) -> tuple[str, list[str]]:
    """The page, and a sentence for what had to be left out of it."""
    remarks: list[str] = []
    most_runs = max(len(table.runs) for table in comparison.tables)
    tables = []
    for place, table in enumerate(comparison.tables):
        curves, more = thinned_curves(comparison, table)
        remarks += more
        share = PICTURES * len(table.runs) // max(1, sum(len(each.runs) for each in comparison.tables))
        samples, left_out = samples_of(table, share)
        tables.append(
            {
                "id": f"t{place}",
                "title": table.title or title_of(table),
                "cards": cards_of(table, samples),
                "rules": rules_of(table.rows, wanted.test, wanted.floor) if table.verdicts else "",
                "columns": [column_of(table, column) for column in table.columns],
                "rows": [row_of(table, row) for row in range(len(table.rows))],
                "seeds": sorted({run.seed for run in table.runs}),
                "num_runs": len(table.runs),
                "num_methods": sum(row.is_method for row in table.rows),
                "remarks": table.remarks,
                "samples": samples,
                "samples_left_out": left_out,
                "drawn": drawn_of(table, samples),
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
        intervals=INTERVALS,
        ways=WAYS,
    )
    return page, remarks


def part(name: str) -> str:
    return (files("unlearn_runner.comparison") / "page" / name).read_text(encoding="utf-8")


def as_json(value: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def breakable(name: str, after: str = "_/") -> Markup:
    """A long name may be broken after each of these letters."""
    return Markup("<wbr>").join(re.split(f"(?<=[{after}])", name))


def title_of(table: Table) -> str:
    """The dataset, for a table that needs no other name."""
    return str(table.runs[0].facts.get("dataset", "runs"))


def column_of(table: Table, column: str) -> dict[str, Any]:
    """`headline`: whether it is shown before a person asks for all."""
    way = way_of(table.rows, column)
    return {
        "name": table.title_of(column),
        "arrow": arrow(way),
        "better": "" if way is None else str(way),
        "headline": column in table.asked,
    }


def row_of(table: Table, place: int) -> dict[str, Any]:
    row, cells = table.rows[place], table.cells[place]
    return {
        "label": row.label,
        "is_method": row.is_method,
        "n": len(row.seeds),
        "cells": [cell_of(table, row, column, cells.get(column)) for column in table.columns],
    }


def cell_of(table: Table, row: Row, column: str, cell: Cell | None) -> dict[str, Any] | None:
    """`rank` is what the page sorts by: how far from the best, or the mean where no direction is good."""
    if cell is None:
        return None
    how_bad = badness(table.rows, row, column)
    return {
        "rank": mean(how_bad.values()) if how_bad else cell.mean,
        "mean": number(cell.mean),
        "interval": interval_text(cell),
        "z": z_text(cell),
        "seeds": seeds_text(cell),
        "best": cell.best,
    }


def cards_of(table: Table, samples: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Who is best at what, and what that one draws under the forget condition."""
    by_label = {row.label: cells for row, cells in zip(table.rows, table.cells, strict=True) if row.is_method}
    strips = {sample["title"]: sample["strip"] for sample in samples if sample["is_method"]}
    cards = []
    for verdict in table.verdicts:
        if verdict.column in by_label[verdict.label]:
            names = [verdict.label, *verdict.equal]
            cards.append(
                {
                    "question": verdict.question,
                    "label": listed(names, 2),
                    "value": text(by_label[verdict.label][verdict.column]),
                    "measured": measured_by(verdict, table.title_of),
                    "sentence": sentence(verdict),
                    "who": verdict.label,
                    "strip": strips.get(verdict.label, ""),
                }
            )
    return cards


def drawn_of(table: Table, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The strips drawn under the forget condition, each with its shares, and why there are none if so."""
    cells = {(row.label, row.is_method): found for row, found in zip(table.rows, table.cells, strict=True)}
    strips = []
    for sample in samples:
        if sample["strip"]:
            found = cells.get((BASE if sample["title"] == "before" else sample["title"], sample["is_method"]), {})
            shares = [f"{column} {number(found[column].mean)}" for column in FORGETTING_AXIS if column in found]
            strips.append({**sample, "shares": ", ".join(shares)})
    if strips:
        why = ""
    elif samples:
        why = "These runs do not tell which of their pictures were drawn under the forget condition: see all samples."
    else:
        why = "These runs have no pictures (samples/after.png), so what is drawn instead cannot be seen here."
    return {"strips": strips, "why": why}


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
                    "difference": difference(result).split(" ", 1),
                    "p": p_value(result),
                    "n": result.n,
                    "real": result.adjusted is not None and result.adjusted < 0.05,
                }
            )
        rows.append({"label": label, "cells": cells})
    return {"columns": [table.title_of(column) for column in columns], "rows": rows}


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
    installed = not (root / "train.py").is_file()
    if not installed and place.is_relative_to(root):
        place = place.relative_to(root)
    place = f"./{place}" if str(place).startswith("-") else place  # else it would read as an option
    command = "python -m unlearn_runner" if installed else "python train.py"
    return f"{command} --config-path {shlex.quote(str(place))} --config-name config"

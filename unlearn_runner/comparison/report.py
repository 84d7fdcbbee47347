"""The comparison as one page that needs no network: tables and pictures of the samples in HTML, plots by its script."""

import json
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlearn_runner.comparison.columns import better
from unlearn_runner.comparison.comparison import Comparison, Table, Wanted
from unlearn_runner.comparison.pictures import PICTURES, samples_of
from unlearn_runner.comparison.plots import plotted, thinned_curves
from unlearn_runner.comparison.render import arrow, difference, p_value
from unlearn_runner.comparison.runs import Run
from unlearn_runner.comparison.statistics import TESTS
from unlearn_runner.comparison.tables import Cell, readable, text
from unlearn_runner.comparison.verdicts import listed, sentence, verdicts_of


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


def breakable(name: str, after: str = "_/") -> Markup:
    """A long name may be broken after each of these letters."""
    return Markup("<wbr>").join(re.split(f"(?<=[{after}])", name))


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
                    "sentence": sentence(verdict),
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
    place = f"./{place}" if str(place).startswith("-") else place  # else it would read as an option
    return f"python train.py --config-path {shlex.quote(str(place))} --config-name config"

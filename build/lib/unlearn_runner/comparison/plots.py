"""The numbers that the page's script draws, rounded and thinned so that the page stays small."""

import math
from statistics import mean
from typing import Any

import numpy as np

from unlearn_runner.catalogue import COST, HIGH, LOW, In, keys
from unlearn_runner.comparison.columns import bounds_of
from unlearn_runner.comparison.comparison import Comparison, Table
from unlearn_runner.comparison.curves import Curve, curves_by_label
from unlearn_runner.comparison.statistics import interval
from unlearn_runner.comparison.tables import Cell, Row, badness, way_of
from unlearn_runner.comparison.tradeoff import FORGETTING_AXIS, RETENTION_AXIS, tradeoffs_of

NUMBERS = 1_000_000  # of all curves of a page, about 6 bytes each
POINTS = (20, 120)  # of one curve, at least and at most
KEYS = 24  # of curves, at most

COSTS = keys(In.PLOT, COST)
CURVES = ("eval/", "loss/", "lambda/", "grad_norm/", "weights/", "")  # which come first
NO_CURVES = ("base/", "floor/", "oracle/", "oracle_gap/", "oracle_std/", "gap_z/", "reached/", "lambda/at/")
NO_CURVE_OF = ("step", "seconds", "images", "version", "eval/deletion_steps", "eval/lasting_deletion_steps")
DETAILS = ("per_class/", "per_timestep/", "per_step/")


def thinned_curves(comparison: Comparison, table: Table) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """All curves of a table, with as many points as keep the page small."""
    labels = sum(row.is_method for each in comparison.tables for row in each.rows)
    several = 3 if any(len(row.seeds) > 1 for row in table.rows if row.is_method) else 1  # a mean, or a band with it
    least, most = POINTS
    return curves_by_label(table.runs, min(most, max(least, NUMBERS // (labels * KEYS * several))))


def plotted(table: Table, curves: dict[str, dict[str, Curve]]) -> dict[str, Any]:
    """What the page's script draws: of a metric that is best near the oracle's, the distance from it."""
    methods = [row.label for row in table.rows if row.is_method]
    place = {label: number for number, label in enumerate(methods)}
    known = {column for row in table.cells for column in row}
    scatter = [column for column in (*FORGETTING_AXIS, *RETENTION_AXIS) if column in known]
    costs = [column for column in COSTS if column in known]
    ways = {column: way_of(table.rows, column) for column in [*scatter, *costs]}
    distances = {column for column in scatter if ways[column] not in (LOW, HIGH)}
    bounds = {column: bounds_of(column) for column in scatter}
    bounds |= {column: (0.0, bounds[column][1] - bounds[column][0]) for column in distances}

    def point(row: Row, cell: Cell, column: str) -> list[float | int | None]:
        middle, ends = cell.mean, cell.interval
        if column in distances:
            values = list(badness(table.rows, row, column).values())
            middle, ends = mean(values), interval(values, bounds[column])
        return [short(middle), *map(short, ends or ())]

    def pairs(row: Row, columns: list[str]) -> dict[str, list[float | int | None]]:
        cells = table.cells[table.rows.index(row)]
        return {column: point(row, cells[column], column) for column in columns if column in cells}

    keys = curve_keys(curves)
    return {
        "methods": [
            {"label": row.label, "cells": pairs(row, [*scatter, *costs])} for row in table.rows if row.is_method
        ],
        "references": [{"label": row.label, "cells": pairs(row, scatter)} for row in table.rows if not row.is_method],
        "names": {
            name: called + (", distance to the oracle's" if name in distances else "")
            for name in [*scatter, *keys]
            if (called := table.title_of(name)) != name or name in distances
        },
        "bounds": {column: ends for column, ends in bounds.items() if math.isfinite(ends[1])},
        "better": {column: LOW if column in distances else str(way) for column, way in ways.items()},
        "tradeoffs": [
            {
                "x": found.forgetting,
                "y": found.retention,
                "front": [place[label] for label in found.front],
                "hypervolume": [short(value) for value in (found.hypervolume, *(found.interval or ()))],
                "worst": found.worst and [short(value) for value in found.worst],
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
                    axis[name] = [short(value) for value in np.interp(steps, [0, *clock.steps], [0, *clock.mean])]
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

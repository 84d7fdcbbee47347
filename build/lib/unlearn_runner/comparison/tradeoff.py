"""Forgetting against retention: who is on the Pareto front, and how much of the plane it dominates."""

import math
from statistics import mean
from typing import NamedTuple

from unlearn_runner.catalogue import FORGETTING, HIGH, LOW, RETENTION, In, keys
from unlearn_runner.comparison.columns import bounds_of
from unlearn_runner.comparison.statistics import hypervolume, interval, pareto_front
from unlearn_runner.comparison.tables import BASE, Row, badness, draws_rubble, reference, usual_outliers, way_of

FORGETTING_AXIS, RETENTION_AXIS = keys(In.PLOT, FORGETTING), keys(In.PLOT, RETENTION)
WORST = 10  # times the base's: where an axis without a bound ends, such as that of fid_retain


class Axis(NamedTuple):
    """From the ideal to the worst of a metric, in the values that are drawn: distances, where those count."""

    ideal: float
    worst: float


class Tradeoff(NamedTuple):
    """One metric of forgetting and one of retention."""

    forgetting: str
    retention: str
    front: list[str]  # labels, from the best at forgetting on; none that draws rubble
    hypervolume: float | None  # of the means: share of the rectangle from the ideal to the worst corner
    interval: tuple[float, float] | None  # 95 %, of the mean over seeds' own hypervolumes
    worst: tuple[float, float] | None  # the worst corner: by bounds or by the base, so that no row moves it


def tradeoffs_of(rows: list[Row]) -> list[Tradeoff]:
    """Every pair of metrics that at least one method has which draws no rubble."""
    usual = usual_outliers(rows)
    able = [row for row in rows if row.is_method and not draws_rubble(row, usual)]
    found = []
    for forgetting in FORGETTING_AXIS:
        for retention in RETENTION_AXIS:
            methods = [row for row in able if row.values.get(forgetting) and row.values.get(retention)]
            if methods:
                found.append(tradeoff(rows, methods, (forgetting, retention)))
    return found


def tradeoff(rows: list[Row], methods: list[Row], columns: tuple[str, str]) -> Tradeoff:
    """The front of `methods`, which are some of the table's `rows`."""
    axes = [axis_of(rows, column) for column in columns]
    bad = [[badness(rows, row, column) for column in columns] for row in methods]
    means = [tuple(mean(by_seed.values()) for by_seed in pair) for pair in bad]
    front = [methods[place].label for place in pareto_front(means)]
    if None in axes:
        return Tradeoff(*columns, front, None, None, None)
    least = tuple(-axis.ideal if axis.ideal > axis.worst else axis.ideal for axis in axes)  # as badness counts
    most = tuple(at + abs(axis.worst - axis.ideal) for at, axis in zip(least, axes, strict=True))
    seeds = sorted(set.intersection(*(set(by_seed) for pair in bad for by_seed in pair)))
    of_seeds = [hypervolume([tuple(each[seed] for each in pair) for pair in bad], least, most) for seed in seeds]
    ends = interval(of_seeds, (0.0, 1.0)) if seeds else None
    return Tradeoff(*columns, front, hypervolume(means, least, most), ends, tuple(axis.worst for axis in axes))


def axis_of(rows: list[Row], column: str) -> Axis | None:
    """By the metric's bounds, or by the base's score where there is none; None without either."""
    way, (low, high) = way_of(rows, column), bounds_of(column)
    if way not in (LOW, HIGH):
        return Axis(0.0, high - low) if math.isfinite(high - low) else None
    if math.isfinite(high):
        ends = max(0.0, low), high  # an SSIM below 0 is no better than one of 0
        return Axis(*ends) if way == LOW else Axis(*reversed(ends))
    base = reference(rows, BASE, column)
    worst = WORST * mean(base.values()) if base else 0.0
    return Axis(0.0, worst) if way == LOW and worst > 0 else None

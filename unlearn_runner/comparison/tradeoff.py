"""Forgetting against retention: who is on the Pareto front, and how much of the plane it dominates."""

import math
from statistics import mean
from typing import Any, NamedTuple

from unlearn_runner.catalogue import FORGETTING, LOW, RETENTION, In, entry_of, keys
from unlearn_runner.comparison.columns import better
from unlearn_runner.comparison.statistics import half_width, hypervolume, pareto_front
from unlearn_runner.comparison.tables import Row

FORGETTING_AXIS, RETENTION_AXIS = keys(In.PLOT, FORGETTING), keys(In.PLOT, RETENTION)


class Tradeoff(NamedTuple):
    """One metric of forgetting and one of retention."""

    forgetting: str
    retention: str
    front: list[str]  # labels, from the best at forgetting on
    hypervolume: float | None  # of the means: share of the rectangle from the ideal to the worst corner
    half_width: float | None  # of the mean over seeds' own hypervolumes
    worst: float  # of the retention axis: where the rectangle ends


def tradeoffs_of(rows: list[Row]) -> list[Tradeoff]:
    """Every pair of metrics that at least one method has, for all its seeds."""
    found = []
    for forgetting in FORGETTING_AXIS:
        for retention in RETENTION_AXIS:
            methods = [
                row for row in rows if row.is_method and row.values.get(forgetting) and row.values.get(retention)
            ]
            if methods:
                found.append(tradeoff(methods, forgetting, retention))
    return found


def tradeoff(methods: list[Row], forgetting: str, retention: str) -> Tradeoff:
    worst = entry_of(retention).bounds[1]  # of a share, 0 is the worst, whose distance from the best is 1
    if math.isinf(worst):
        worst = max(mean(row.values[retention].values()) for row in methods)

    def cost(column: str, value: float) -> float:
        return value if better(column) == LOW else entry_of(column).bounds[1] - value

    def volume(points: list[tuple[float, float]]) -> float:
        return hypervolume(points, (0.0, 0.0), (1.0, worst))

    def points(values: Any) -> list[tuple[float, float]]:
        return [tuple(cost(column, values(row, column)) for column in (forgetting, retention)) for row in methods]

    means = points(lambda row, column: mean(row.values[column].values()))
    front = [methods[place].label for place in pareto_front(means)]
    common = set.intersection(*(set(row.values[column]) for row in methods for column in (forgetting, retention)))
    by_seed = [volume(points(lambda row, column, seed=seed: row.values[column][seed])) for seed in sorted(common)]
    if worst <= 0:
        return Tradeoff(forgetting, retention, front, None, None, worst)
    return Tradeoff(forgetting, retention, front, volume(means), half_width(by_seed), worst)

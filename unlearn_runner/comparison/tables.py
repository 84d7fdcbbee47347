"""Runs become tables: those measured alike in one, a row for each label, a value for each seed."""

import math
from collections import Counter
from collections.abc import Container, Mapping
from statistics import mean, stdev
from typing import Any, NamedTuple

from unlearn_runner.catalogue import HIGH, LOW, ORACLE, USUAL, is_rubble, what_z_says, z_of
from unlearn_runner.comparison.columns import better, bounds_of, counted_of, drawn_instead, forgets, key_of
from unlearn_runner.comparison.runs import Run, SkippedRun
from unlearn_runner.comparison.statistics import Paired, corrected, interval, paired
from unlearn_runner.errors import ConfigurationError, near

BASE, REFERENCE, REAL = "base", "oracle", "real images"
BUDGET = ("steps", "batch_size")  # facts that say how long a method trained, not how it was measured
IN_WORDS = {  # how names of facts begin
    "num_inference_steps": "sampling steps",
    "num_samples.": "samples under ",
    "num_references.": "reference images of ",
}
KEPT = "retain_accuracy"
FLOOR = 0.9  # of the base's retain_accuracy, below which nobody is called the best


class Group(NamedTuple):
    """Runs that may stand in one table."""

    facts: dict[str, Any]
    runs: list[Run]


class Row(NamedTuple):
    """The base, the oracle, or the runs of one label."""

    label: str
    is_method: bool
    seeds: list[int]
    values: dict[str, dict[int, float]]  # by column and seed; of oracles that are named by column and oracle
    aims: dict[str, dict[int, float]] | None = None  # of those: their mean by column and seed of the runs


class Cell(NamedTuple):
    """A row's mean over its seeds."""

    mean: float
    interval: tuple[float, float] | None  # 95 %, see `interval` of statistics
    n: int  # seeds that have a value
    of: int  # seeds of the row
    best: bool
    std: float | None = None  # of several oracles, shown in place of the interval
    z: float | None = None  # of a method's mean, see `z_of`; None without several oracles that differ


def groups_of(runs: list[Run]) -> list[Group]:
    """Runs whose facts agree wherever both have them; the largest group first, then by label.

    An older run that does not tell a fact joins the first group that it does not contradict. When files were written
    plays no part: after a clone that says nothing.
    """
    alike: dict[frozenset, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.label, run.folder)):
        alike.setdefault(frozenset(run.facts.items()), []).append(run)
    groups: list[Group] = []
    for together in sorted(alike.values(), key=lambda together: (-len(together[0].facts), -len(together))):
        facts = together[0].facts
        for group in groups:
            if all(group.facts.get(key, value) == value for key, value in facts.items()):
                group.facts.update(facts)
                group.runs.extend(together)
                break
        else:
            groups.append(Group(dict(facts), list(together)))
    return sorted(groups, key=lambda group: (-len(group.runs), min(run.label for run in group.runs)))


def whatever_budget(run: Run) -> Run:
    """The run with its budget among its settings, so that it may stand beside runs of another one."""
    budget = {f"trainer.{key}": run.facts[key] for key in BUDGET if key in run.facts}  # methods have a batch_size, too
    rest = {key: value for key, value in run.facts.items() if key not in BUDGET}
    return run._replace(facts=rest, settings=budget | run.settings)


def what_differs(groups: list[Group]) -> tuple[list[str], int]:
    """For each group the facts that tell it from the others in a few words, and how many more facts differ."""
    order = list(dict.fromkeys(key for group in groups for key in group.facts))
    differing = [key for key in order if len({group.facts.get(key) for group in groups}) > 1]
    chosen: list[str] = []
    known: list[tuple[Any, ...]] = [()] * len(groups)
    for key in differing:
        further = [(*before, group.facts.get(key)) for before, group in zip(known, groups, strict=True)]
        if len(set(further)) > len(set(known)):
            chosen, known = [*chosen, key], further
    names = [", ".join(f"{readable(key)} {said(group.facts.get(key))}" for key in chosen) for group in groups]
    return names, len(differing) - len(chosen)


def readable(key: str) -> str:
    """A fact's name for a sentence."""
    name = key.removeprefix("evaluation.")
    for start, words in IN_WORDS.items():
        name = name.replace(start, words)
    return name.replace("_", " ")


def said(value: Any) -> str:
    return "not said" if value is None else str(value)


def distinguished(runs: list[Run]) -> list[Run]:
    """The same runs; those of one label whose methods were set differently get what differs added to their label.

    A schedule of as many steps as the run goes without saying, and a class that lies in another file is the same one.
    """
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    named: list[Run] = []
    for label, same in by_label.items():
        keys = dict.fromkeys(key for run in same for key in run.settings)
        found = {key: [repr(compared(key, run.settings.get(key))) for run in same] for key in keys}
        budgets = {key: found[key] for key in (f"trainer.{name}" for name in BUDGET) if key in found}
        varying = [
            key for key in keys
            if len(set(found[key])) > 1 and (key in budgets or found[key] not in budgets.values())
        ]  # fmt: skip
        names = short_names(varying)
        for run in same:
            more = " ".join(f"{names[key]}={last_part(run.settings.get(key))}" for key in varying)
            named.append(run._replace(label=f"{label} {more}".strip()))
    return sorted(named, key=lambda run: run.written)


def short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two keys end alike."""
    ends = Counter(end_of(key) for key in keys)
    return {key: end_of(key) if ends[end_of(key)] == 1 else key for key in keys}


def end_of(key: str) -> str:
    return key.removesuffix("._target_").rpartition(".")[2]


def compared(key: str, value: Any) -> Any:
    """What of a setting tells two methods apart: of a class's path its name."""
    return last_part(value) if key.endswith("_target_") else value


def last_part(value: Any) -> str:
    """A value for a label: of a class's path its name."""
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)


def newest(runs: list[Run]) -> tuple[list[Run], list[SkippedRun]]:
    """Of each label and seed the newest run, in the order of labels and seeds; the others stand apart."""
    kept: dict[tuple[str, int], Run] = {}
    apart = []
    for run in sorted(runs, key=lambda run: run.written):
        if old := kept.get((run.label, run.seed)):
            apart.append(SkippedRun(old.folder, f"made again later ({old.label}, seed {old.seed})"))
        kept[run.label, run.seed] = run
    return sorted(kept.values(), key=lambda run: (run.label, run.seed)), apart


def rows_of(runs: list[Run], columns: list[str]) -> list[Row]:
    """Base, oracle and real images where they were measured, then a row for each label in alphabetical order.

    Each seed counts once: every method of a seed has the same base and the same oracles. Real images that score the
    same are the same ones, whatever the seed. Where all runs with oracles say which these are, each oracle counts once,
    however many seeds share it.
    """
    rows: dict[tuple[bool, str], dict[str, dict[int, float]]] = {}
    kinds = ((False, BASE, BASE), (False, REFERENCE, REFERENCE), (False, REAL, "floor"))
    for run in sorted(runs, key=lambda run: (run.label, run.seed)):
        for is_method, name, prefix in (*kinds, (True, run.label, "eval")):
            row = rows.setdefault((is_method, name), {})
            for column in columns:
                key = key_of(column, prefix)
                if key in run.metrics and (is_method or key != column):  # what has no prefix is the method's
                    row.setdefault(column, {})[run.seed] = run.metrics[key]
    real = rows[False, REAL]
    if len({tuple(by_seed.get(seed) for by_seed in real.values()) for seed in seeds_of(real)}) == 1:
        rows[False, REAL] = {column: dict([*by_seed.items()][:1]) for column, by_seed in real.items()}
    aims = None
    if all(run.oracles for run in runs if any(key.startswith(f"{REFERENCE}/") for key in run.metrics)):
        aims = rows[False, REFERENCE]
        rows[False, REFERENCE] = by_oracle(runs, columns)
    seeds = {label: sorted(run.seed for run in runs if run.label == label) for label in {run.label for run in runs}}
    return [
        Row(
            name,
            is_method,
            seeds[name] if is_method else seeds_of(values),
            values,
            aims if name == REFERENCE and not is_method else None,
        )
        for (is_method, name), values in sorted(rows.items(), key=lambda item: item[0][0])
        if is_method or values
    ]


def by_oracle(runs: list[Run], columns: list[str]) -> dict[str, dict[int, float]]:
    """The scores of each oracle by column and its place among all; averaged over the runs that were compared with it,
    for a few scores depend on their base, too.
    """
    scores: dict[str, list[dict[str, float]]] = {}
    for run in sorted(runs, key=lambda run: (run.label, run.seed)):
        for digest, metrics in run.oracles.items():
            scores.setdefault(digest, []).append(metrics)
    found: dict[str, dict[int, float]] = {}
    for place, same in enumerate(scores.values()):
        for column in columns:
            if values := [metrics[column] for metrics in same if column in metrics]:
                found.setdefault(column, {})[place] = mean(values)
    return found


def seeds_of(values: dict[str, dict[int, float]]) -> list[int]:
    return sorted({seed for by_seed in values.values() for seed in by_seed})


def in_order(rows: list[Row], by: str, barred: Container[str] = ()) -> list[Row]:
    """Base and oracle, then the methods from the best to the worst in a column, and last those that are `barred` from
    being called the best; "label": alphabetical.
    """
    methods = [row for row in rows if row.is_method]
    references = [row for row in rows if not row.is_method]
    if by == "label":
        return references + sorted(methods, key=lambda row: row.label)

    def place(row: Row) -> tuple[bool, bool, float, str]:
        if not row.values.get(by):
            return row.label in barred, True, 0.0, row.label
        how_bad = badness(rows, row, by) or row.values[by]
        return row.label in barred, False, mean(how_bad.values()), row.label

    return references + sorted(methods, key=place)


def reference(rows: list[Row], label: str, column: str) -> dict[int, float]:
    """What the base or the oracle has in a column, by seed; {} where that was not measured."""
    found = [row.values[column] for row in rows if not row.is_method and row.label == label and column in row.values]
    return found[0] if found else {}


def oracles_by_seed(rows: list[Row], column: str) -> dict[int, float]:
    """What the runs of each seed were compared with: of several oracles their mean."""
    named = [row.aims.get(column, {}) for row in rows if row.aims is not None]
    return named[0] if named else reference(rows, REFERENCE, column)


def oracle_mean(rows: list[Row], column: str) -> float | None:
    found = reference(rows, REFERENCE, column)
    return mean(found.values()) if found else None


def way_of(rows: list[Row], column: str) -> str | float | None:
    """Where a column is best in this table: LOW, HIGH, ORACLE (nearest to the oracle's), a value, or None.

    How much was forgotten is best as the oracle's wherever the oracle was measured: a method that shows the content
    less often than a model that never saw it does is not better for that. What is drawn instead is no better for being
    the oracle's where that is rubble.
    """
    way = better(column)
    to_oracle = forgets(column) and reference(rows, REFERENCE, column)
    if to_oracle and not (drawn_instead(column) and oracle_draws_rubble(rows)):
        return ORACLE
    return None if way == ORACLE else way


def badness(rows: list[Row], row: Row, column: str) -> dict[int, float]:
    """How far from the best a row is by seed, the less the better; {} where no direction is good.

    The oracle's value is that of the same seed, of several oracles their mean, or where that seed has none the mean
    over all. Named oracles have no seeds: they are compared with the mean over all.
    """
    values, way = row.values.get(column, {}), way_of(rows, column)
    if way is None:
        return {}
    if way in (LOW, HIGH):
        return {seed: value if way == LOW else -value for seed, value in values.items()}
    if way != ORACLE:
        return {seed: distance(value, way) for seed, value in values.items()}
    aims = oracles_by_seed(rows, column) if row.aims is None else {}
    return {seed: distance(value, aims.get(seed, oracle_mean(rows, column))) for seed, value in values.items()}


def distance(value: float, aim: float) -> float:
    """How far apart two scores are, to 12 digits of the larger one: 0.05 and 0.06 are equally far from 0.055, and what
    subtracting leaves beyond that is no difference that a test may find.
    """
    largest = max(abs(value), abs(aim))
    return round(abs(value - aim), 12 - math.ceil(math.log10(largest))) if largest else 0.0


def cells_of(
    rows: list[Row], columns: list[str], barred: Mapping[str, str], num_samples: Mapping[str, int]
) -> list[dict[str, Cell]]:
    """For each row its means by column. The best is marked among the `eligible` rows.

    Nothing is marked where no direction is good, where all methods are alike, or where there is only one.
    `num_samples` are those of the sets "forget" and "retain".
    """
    cells: list[dict[str, Cell]] = [{} for _ in rows]
    for column in columns:
        may_win = {row.label for row in eligible(rows, column, barred)}
        bad: dict[int, float] = {}
        for place, row in enumerate(rows):
            if not (values := list(row.values.get(column, {}).values())):
                continue
            ends = interval(values, bounds_of(column), num_samples.get(counted_of(column)))
            std = stdev(values) if row.aims is not None and len(values) > 1 else None
            z = z_of(column, mean(values), oracles_of(rows, column)) if row.is_method else None
            of = max(len(row.seeds), len(values))
            cells[place][column] = Cell(mean(values), ends, len(values), of, False, std, z)
            if row.is_method and row.label in may_win and (how_bad := badness(rows, row, column)):
                bad[place] = mean(how_bad.values())
        if len(bad) < 2:
            continue
        least = number(min(bad.values()))
        same = [place for place in bad if number(bad[place]) == least]
        for place in same if len(same) < len(bad) else ():
            cells[place][column] = cells[place][column]._replace(best=True)
    return cells


def eligible(rows: list[Row], column: str, barred: Mapping[str, str]) -> list[Row]:
    """Methods that may be called the best: with a value for all of their seeds, and more than one if any has more; none
    of those that are `barred`.
    """
    methods = [row for row in rows if row.is_method and row.seeds and row.label not in barred]
    whole = [row for row in methods if len(row.values.get(column, {})) == len(row.seeds)]
    return [row for row in whole if len(row.seeds) > 1] or whole


def barred_of(rows: list[Row], floor: float) -> dict[str, str]:
    """Why a method may not be called the best at anything, by label: it draws rubble, or keeps less than `floor` times
    the base's retain_accuracy, where that was measured.
    """
    usual, found = usual_outliers(rows), {}
    base = reference(rows, BASE, KEPT)
    least = floor * mean(base.values()) if base else 0.0
    for row in rows:
        if not row.is_method:
            continue
        kept = row.values.get(KEPT)
        if draws_rubble(row, usual):
            found[row.label] = "draws what is like no real image"
        elif kept and mean(kept.values()) < least:
            found[row.label] = f"{KEPT} {number(mean(kept.values()))}, below {number(least)}"
    return found


def usual_outliers(rows: list[Row]) -> float:
    """The share of samples that are like no real image in what the base draws, under the retained conditions if that
    was measured. What an oracle draws under a condition that it has never seen excuses nobody.
    """
    base = next(filter(None, (reference(rows, BASE, column) for column in USUAL)), {})
    return mean(base.values()) if base else 0.0


def oracle_draws_rubble(rows: list[Row]) -> bool:
    """As where no retained image has the forget condition, so that it was never trained under it."""
    nothing = oracle_mean(rows, "nothing_rate")
    return nothing is not None and is_rubble(nothing, usual_outliers(rows))


def draws_rubble(row: Row, usual: float) -> bool:
    """`is_rubble` of a row's means; where the judge could not abstain, not."""
    nothing = row.values.get("nothing_rate")
    return bool(nothing) and is_rubble(mean(nothing.values()), usual)


def oracles_of(rows: list[Row], column: str) -> list[float]:
    """The score of each oracle, where they are named."""
    return [value for row in rows if row.aims is not None for value in row.values.get(column, {}).values()]


def spread_of_oracles(rows: list[Row]) -> list[str]:
    """What the spread in the row of several oracles is, and z in the methods' rows."""
    named = [row for row in rows if row.aims is not None]
    count = sum(len(row.seeds) for row in named)
    if count < 2:
        return []
    said = (
        f"oracle: mean ± standard deviation of {count} models that never saw the forget set; all else ± half the 95 %"
    )
    differ = any(z_of(column, 0.0, oracles_of(rows, column)) is not None for row in named for column in row.values)
    of_z = what_z_says(count) if differ else "No z, for all of them have the same scores."
    return [f"{said} interval over seeds. {of_z}"]


def number(value: float) -> str:
    """As many digits as a table needs."""
    return f"{value:.{digits_of(value)}f}"


def digits_of(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3


def text(cell: Cell) -> str:
    """The mean, the interval and z if there are some, and how many of the row's seeds have a value if not all."""
    z = z_text(cell)
    said = " ".join(filter(None, (number(cell.mean), interval_text(cell)))) + (f", {z}" if z else "")
    return " ".join(filter(None, (said, seeds_text(cell))))


def z_text(cell: Cell) -> str:
    return "" if cell.z is None else f"z={cell.z:+.1f}"


def seeds_text(cell: Cell) -> str:
    return "" if cell.n == cell.of else f"({cell.n} of {cell.of})"


def interval_text(cell: Cell) -> str:
    """± half the interval, or [low, high] where it is not symmetric: Wilson's, or cut at a bound; of several oracles
    their standard deviation instead.
    """
    digits = digits_of(cell.mean)
    if cell.std is not None:
        return f"± {cell.std:.{digits}f}" if cell.std else ""
    if cell.interval is None:
        return ""
    below, above = cell.mean - cell.interval[0], cell.interval[1] - cell.mean
    if math.isclose(below, above, rel_tol=1e-6):
        return f"± {above:.{digits}f}"
    low, high = (f"{end:.{digits}f}" for end in cell.interval)
    return f"[{low}, {high}]"


def tests_of(rows: list[Row], columns: list[str], baseline: str, test: str) -> dict[str, dict[str, Paired]]:
    """Every other method against the baseline, by row and column; Holm's correction over the methods of a column."""
    methods = {row.label: row for row in rows if row.is_method}
    found: dict[str, dict[str, Paired]] = {label: {} for label in methods if label != baseline}
    for column in columns:
        theirs = methods[baseline].values.get(column, {})
        results = {label: paired(methods[label].values.get(column, {}), theirs, test) for label in found}
        there = {label: result for label, result in results.items() if result is not None}
        adjusted = corrected([(result.n, result.p) for result in there.values()])
        for (label, result), after in zip(there.items(), adjusted, strict=True):
            found[label][column] = result._replace(adjusted=after)
    return found


def require_baseline(baseline: str, labels: set[str]) -> None:
    """Raise ConfigurationError with the nearest names unless some table has this row."""
    if baseline not in labels:
        raise ConfigurationError(f"no run has the label '{baseline}' for a baseline{near(baseline, labels)}.")

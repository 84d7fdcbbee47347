"""Who is best at what, who may not be called so, and from whom these seeds do not tell the best apart."""

from collections.abc import Callable, Mapping
from statistics import mean
from typing import NamedTuple

from unlearn_runner.catalogue import ORACLE
from unlearn_runner.comparison.statistics import LEVEL, TESTS, against_best
from unlearn_runner.comparison.tables import BASE, KEPT, Row, badness, eligible, number, oracle_mean, reference, way_of

# What a person asks first, and the metrics that answer it.
QUESTIONS = {
    "forgets best": ("forget_rate",),
    "restores most": ("restored_rate",),
    "keeps most": (KEPT, "fid_retain", "clip_score_retain"),
    "costs least": ("cost/network_evaluations", "cost/seconds"),
}


class Verdict(NamedTuple):
    """The best method by one metric."""

    question: str
    column: str
    label: str
    oracle: float | None  # what the best is nearest to; None where a direction counts
    equal: list[str]  # methods with exactly its distance from the best possible
    close: list[str]  # p after Holm's correction is 0.05 or more
    unknown: list[str]  # too few common seeds for a test
    constant: list[str]  # differ by the same amount in every seed, so that there is no spread to test by
    apart: list[str]  # p after Holm's correction is below 0.05


def verdicts_of(rows: list[Row], barred: Mapping[str, str], test: str = "t") -> list[Verdict]:
    """For each question the first metric that every method has; nothing where fewer than two rows could win."""
    found = []
    for question, column in asked(rows):
        if len(may_win := eligible(rows, column, barred)) >= 2:
            found.append(verdict_on(question, column, rows, may_win, test))
    return found


def asked(rows: list[Row]) -> list[tuple[str, str]]:
    """The questions that can be answered, each with the first metric that every method has."""
    methods = [row for row in rows if row.is_method]
    found = []
    for question, columns in QUESTIONS.items():
        measured = (column for column in columns if all(row.values.get(column) for row in methods))
        if (column := next(measured, None)) is not None:
            found.append((question, column))
    return found


def verdict_on(question: str, column: str, rows: list[Row], may_win: list[Row], test: str) -> Verdict:
    bad = {row.label: badness(rows, row, column) for row in may_win}
    means = {label: mean(values.values()) for label, values in bad.items()}
    best = min(means, key=means.__getitem__)
    oracle = oracle_mean(rows, column) if way_of(rows, column) == ORACLE else None
    equal = [label for label in bad if label != best and means[label] == means[best]]
    verdict = Verdict(question, column, best, oracle, equal, [], [], [], [])
    for label, (n, p) in against_best(bad, best, test).items():
        if label in equal:
            continue
        if p is None:
            (verdict.constant if n > 1 else verdict.unknown).append(label)
        else:
            (verdict.close if p >= LEVEL else verdict.apart).append(label)
    return verdict


def passed_over(rows: list[Row], barred: Mapping[str, str], title_of: Callable[[str], str] = str) -> str | None:
    """One sentence on methods that would be the best at something but for why they are barred from it."""
    first: dict[str, list[str]] = {}
    for _, column in asked(rows):
        means = {row.label: mean(badness(rows, row, column).values()) for row in rows if row.is_method}
        best = min(means, key=means.__getitem__)
        allowed = [means[row.label] for row in eligible(rows, column, barred)]
        if best in barred and all(means[best] < value for value in allowed):
            first.setdefault(best, []).append(title_of(column))
    named = [f"{label} by {' and '.join(columns)} ({barred[label]})" for label, columns in first.items()]
    return f"first, but not called the best: {'; '.join(named)}." if named else None


def sentence(verdict: Verdict) -> str:
    """What the seeds say of the difference."""
    said = []
    for names, words in (
        (verdict.equal, "equal"),
        (verdict.close, "not distinguished by these seeds"),
        (verdict.unknown, "too few common seeds for a test"),
        (verdict.constant, "the same difference in every seed, so without a test"),
        (verdict.apart, "distinguished from"),
    ):
        if names:
            said.append(f"{words}: {listed(names)}")
    return "; ".join(said)


def rules_of(rows: list[Row], test: str, floor: float) -> str:
    """How the best is found and tested."""
    has_floor = floor > 0 and reference(rows, BASE, KEPT)
    low = f", nor is who has less than {floor:g} of the base's {KEPT} (--floor)" if has_floor else ""
    return (
        f"Distinguished: {TESTS[test]} on common seeds, p < {LEVEL} after Holm's correction over all pairs of methods, "
        "which pays for picking the best from the same numbers. Never called the best is who draws what is like no "
        f"real image under the forget condition{low}."
    )


def measured_by(verdict: Verdict, title_of: Callable[[str], str] = str) -> str:
    """The metric of a verdict, and what it is to be near to."""
    near = "" if verdict.oracle is None else f", nearest to the oracle's {number(verdict.oracle)}"
    return f"{title_of(verdict.column)}{near}"


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

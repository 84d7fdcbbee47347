"""Who is best at what, and from whom these seeds do not tell it apart."""

from statistics import mean
from typing import NamedTuple

from unlearn_runner.comparison.columns import better
from unlearn_runner.comparison.statistics import holm, paired
from unlearn_runner.comparison.tables import Row, badness, eligible

# What a person asks first, and the metrics that answer it.
QUESTIONS = {
    "forgets best": ("forget_rate",),
    "restores most": ("restored_rate",),
    "keeps most": ("retain_accuracy", "fid_retain", "clip_score_retain"),
    "costs least": ("cost/network_evaluations", "cost/seconds"),
}


class Verdict(NamedTuple):
    """The best method by one metric."""

    question: str
    column: str
    label: str
    equal: list[str]  # methods with exactly its mean
    close: list[str]  # p after Holm's correction is 0.05 or more
    unknown: list[str]  # too few common seeds for a test
    constant: list[str]  # differ by the same amount in every seed, so that there is no spread to test by
    apart: list[str]  # p after Holm's correction is below 0.05


def verdicts_of(rows: list[Row], test: str = "t") -> list[Verdict]:
    """For each question the first metric that every method has; nothing where fewer than two rows could win."""
    found = []
    for question, columns in QUESTIONS.items():
        for column in columns:
            methods = [row for row in rows if row.is_method]
            if len(eligible(rows, column)) >= 2 and all(row.values.get(column) for row in methods):
                found.append(verdict_on(question, column, methods, eligible(rows, column), test))
                break
    return found


def verdict_on(question: str, column: str, methods: list[Row], may_win: list[Row], test: str) -> Verdict:
    best = min(may_win, key=lambda row: badness(mean(row.values[column].values()), better(column), None))
    others = [row for row in methods if row.label != best.label]
    centre = mean(best.values[column].values())
    equal = [row.label for row in others if mean(row.values[column].values()) == centre]
    results = [paired(row.values[column], best.values[column], test) for row in others]
    corrected = holm([None if result is None else result.p for result in results])
    verdict = Verdict(question, column, best.label, equal, [], [], [], [])
    for row, result, p in zip(others, results, corrected, strict=True):
        if row.label in equal:
            continue
        if p is not None:
            (verdict.close if p >= 0.05 else verdict.apart).append(row.label)
        else:
            (verdict.constant if result is not None and result.n > 1 else verdict.unknown).append(row.label)
    return verdict


def sentence(verdict: Verdict) -> str:
    """What the seeds say of the difference."""
    said = []
    for names, words in (
        (verdict.equal, "equal"),
        (verdict.close, "not told apart by these seeds"),
        (verdict.unknown, "too few common seeds for a test"),
        (verdict.constant, "the same difference in every seed, so without a test"),
    ):
        if names:
            said.append(f"{words}: {listed(names)}")
    return "; ".join(said) or "told apart from all others (p < 0.05)"


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""The comparison of all runs that were found: tables, tests, what stands apart and what is to be said of it."""

from collections import Counter
from functools import partial
from statistics import mean
from typing import NamedTuple

from unlearn_runner import catalogue
from unlearn_runner.catalogue import USUAL, hides_rubble
from unlearn_runner.comparison.columns import COUNTED, HEADLINES, choose, key_of, shown
from unlearn_runner.comparison.runs import Run, RunsRead, SkippedRun
from unlearn_runner.comparison.statistics import Paired
from unlearn_runner.comparison.tables import (
    FLOOR,
    Cell,
    Row,
    barred_of,
    cells_of,
    distinguished,
    draws_rubble,
    groups_of,
    in_order,
    newest,
    oracle_draws_rubble,
    oracle_mean,
    require_baseline,
    rows_of,
    spread_of_oracles,
    tests_of,
    usual_outliers,
    what_differs,
    whatever_budget,
)
from unlearn_runner.comparison.verdicts import QUESTIONS, Verdict, passed_over, verdicts_of


class Wanted(NamedTuple):
    """What a user asked for."""

    metrics: list[str]  # names of columns; empty: the usual ones
    short: bool  # the usual ones: headlines only
    sort: str | None
    baseline: str | None
    test: str  # a key of statistics.TESTS
    marks: bool = True
    whole: bool = False  # every other usual metric too, after these
    floor: float = FLOOR  # share of the base's retain_accuracy; who keeps less is never called the best
    any_budget: bool = False  # runs of different budgets in one table


class Table(NamedTuple):
    """Runs that were measured alike."""

    title: str  # what tells it from the other tables; "" for the only one
    runs: list[Run]
    rows: list[Row]
    columns: list[str]
    cells: list[dict[str, Cell]]  # of each row
    asked: list[str]  # the columns that were chosen, else the headlines: those of the paired tests
    tests: dict[str, dict[str, Paired]]
    verdicts: list[Verdict]
    remarks: list[str]

    def title_of(self, column: str) -> str:
        return title_of(self.runs, column)


class Comparison(NamedTuple):
    tables: list[Table]
    apart: list[SkippedRun]
    remarks: list[str]


def compare(found: RunsRead, wanted: Wanted) -> Comparison:
    """Raises ConfigurationError for a metric or a baseline that no run has."""
    keys = keys_of(found.runs)
    chosen = choose(wanted.metrics, keys)
    columns = chosen or shown(keys, wanted.short)
    if wanted.whole:
        columns = list(dict.fromkeys([*columns, *shown(keys, short=False)]))
    by = wanted.sort
    if by not in (None, "label"):
        (by,) = choose([by], keys)
    groups = groups_of([whatever_budget(run) for run in found.runs] if wanted.any_budget else found.runs)
    titles, more = what_differs(groups) if len(groups) > 1 else ([""] * len(groups), 0)
    tables, apart = [], list(found.apart)
    for group, title in zip(groups, titles, strict=True):
        runs, old = newest(distinguished(group.runs))
        apart += old
        tables.append(table_of(runs, title, columns, chosen or list(HEADLINES), by, wanted))
    if wanted.baseline is not None:
        require_baseline(wanted.baseline, {row.label for table in tables for row in table.rows if row.is_method})
    remarks = list(found.remarks)
    if absent := [name for name in wanted.metrics if name.removeprefix("eval/") not in chosen]:
        remarks.append(f"no run has {', '.join(absent)}.")
    if len(tables) > 1:
        further = f" ({more} further settings differ with these)" if more else ""
        remarks.append(f"these runs were not measured alike, so they stand in {len(tables)} tables{further}.")
    return Comparison(tables, apart, remarks)


def table_of(
    runs: list[Run], title: str, columns: list[str], asked: list[str], by: str | None, wanted: Wanted
) -> Table:
    """The table of runs that were measured alike; `by` None sorts by forgetting, if that was measured."""
    keys = keys_of(runs)
    if by is None:
        by = "forget_rate" if key_of("forget_rate") in keys else "label"
    answers = [*(column for names in QUESTIONS.values() for column in names), *USUAL]
    read = [column for column in dict.fromkeys([*columns, *answers, by]) if key_of(column) in keys]
    columns = [column for column in columns if column in read]
    asked = [column for column in columns if column in asked]
    rows = rows_of(runs, read)
    barred = barred_of(rows, wanted.floor)
    rows = in_order(rows, by, barred)
    cells = cells_of(rows, columns, barred, num_samples_of(runs))
    if not wanted.marks:
        cells = [{column: cell._replace(best=False) for column, cell in row.items()} for row in cells]
    has_baseline = wanted.baseline in {row.label for row in rows if row.is_method}
    tests = tests_of(rows, asked, wanted.baseline, wanted.test) if has_baseline else {}
    over = passed_over(rows, barred, partial(title_of, runs))
    remarks = [*differing_environments(runs), *single_seeds(rows), *spread_of_oracles(rows), *rubble(rows)]
    verdicts = verdicts_of(rows, barred, wanted.test)
    return Table(title, runs, rows, columns, cells, asked, tests, verdicts, [*remarks, *([over] if over else [])])


def title_of(runs: list[Run], column: str) -> str:
    """How a column of these runs is called where it is printed: with the features that it is measured in."""
    extractors = (run.facts.get("evaluation.features.extractor") for run in runs)
    return catalogue.title(column, next(filter(None, extractors), None))


def num_samples_of(runs: list[Run]) -> dict[str, int]:
    """How many samples each evaluation drew, by set: the same in all runs of a table that tell it."""
    found = {}
    for name in COUNTED.values():
        for key in (f"evaluation.num_samples.{name}", "evaluation.num_samples.all"):
            counts = [count for run in runs if isinstance(count := run.facts.get(key), int) and count > 0]
            found |= {name: counts[0]} if counts and name not in found else {}
    return found


def keys_of(runs: list[Run]) -> set[str]:
    return {key for run in runs for key in run.metrics}


def differing_environments(runs: list[Run]) -> list[str]:
    """A sentence if the runs of a table were made by different software or machines: then seconds do not compare."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    named = []
    for key in keys:
        counts = Counter(str(run.environment.get(key, "not said")) for run in runs)
        if len(counts) < 2:
            continue
        name = key.removeprefix("packages.")
        several = ", ".join(f"{value} ({count} runs)" for value, count in counts.most_common(3))
        named.append(f"{len(counts)} git commits" if key == "git_commit" else f"{name} {several}")
    return [f"made by different software or machines, mind the seconds: {'; '.join(named)}."] if named else []


def rubble(rows: list[Row]) -> list[str]:
    """A sentence for methods that may not be called the best, for what they draw is like no real image, and one for
    those of which that is not known.
    """
    usual = usual_outliers(rows)
    methods = [row for row in rows if row.is_method]
    named = [
        f"{row.label} ({mean(row.values['nothing_rate'].values()):.0%})" for row in methods if draws_rubble(row, usual)
    ]
    said = "never called the best, for much of what they draw under the forget condition is like no real image"
    sentences = [f"{said} (nothing_rate): {', '.join(named)}."] if named else []
    if hides_rubble(usual) and any(row.values.get("nothing_rate") for row in methods):
        sentences.append(
            f"{usual:.0%} of what the base draws is like no real image, so nobody's samples can be distinguished from "
            "rubble: look at them before you believe that a method forgets."
        )
    elif oracle_draws_rubble(rows):
        share = oracle_mean(rows, "nothing_rate")
        sentences.append(
            f"{share:.0%} of what the oracle draws under the forget condition is like no real image, as where it was "
            "never trained under it, so what a method draws instead is not compared with the oracle's."
        )
    unknown = {}  # and in how many of the seeds
    for row in methods:
        rated, looked_at = (row.values.get(column, {}).keys() for column in ("forget_rate", "nothing_rate"))
        if missing := rated - looked_at:
            unknown[row.label] = "" if missing == rated else f" ({len(missing)} of {len(rated)} seeds)"
    if unknown:
        everyone = len(unknown) == len(methods) and not any(unknown.values())
        whose = "any method" if everyone else few_of([label + seeds for label, seeds in unknown.items()])
        sentences.append(
            f"not known, for no nothing_rate was measured, whether what is drawn under the forget condition is like a "
            f"real image, of {whose}: look at the samples before you believe that it forgets."
        )
    return sentences


def few_of(labels: list[str]) -> str:
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")


def single_seeds(rows: list[Row]) -> list[str]:
    """A sentence for methods of one seed: what is said of several does not hold for them."""
    methods = [row for row in rows if row.is_method]
    alone = [row.label for row in methods if len(row.seeds) == 1]
    beaten = "" if len(alone) == len(methods) else ", and not called the best where a method of several may be"
    return [f"one seed only, so without an interval over seeds{beaten}: {few_of(alone)}."] if alone else []

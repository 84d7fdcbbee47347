"""The columns of a comparison: which there are, where each is best, which are shown; by unlearn_runner/catalogue.py."""

import math
from collections.abc import Iterable

from unlearn_runner.catalogue import FORGETTING, LOW, RETENTION, In, entry_of, keys
from unlearn_runner.errors import ConfigurationError, near

COLUMNS, HEADLINES = keys(In.LONG), keys(In.SHORT)


def better(column: str) -> str | float | None:
    """LOW, HIGH, ORACLE, the value that is best, or None where no direction is good.

    A column is a metric of `eval/` without that prefix, or any other key of a summary in full.
    """
    if column.startswith("cost/"):
        return LOW
    return None if (entry := entry_of(column)) is None else entry.better


def forgets(column: str) -> bool:
    """Whether a column says how much was forgotten, in a direction that is good."""
    return (entry := entry_of(column)) is not None and entry.about == FORGETTING and entry.better is not None


def drawn_instead(column: str) -> bool:
    """Whether a column says what is drawn in place of the forgotten content, rather than how much of that is left."""
    entry = entry_of(column)
    of_samples = ("Rates", "Outliers", "FID", "KID", "CMMD")
    return entry is not None and forgets(column) and entry.made_by in of_samples and entry.key != "forget_rate"


def bounds_of(column: str) -> tuple[float, float]:
    """The least and the most that a column can be."""
    entry = entry_of(column.removeprefix("base/").removeprefix("oracle/"))
    return (-math.inf, math.inf) if entry is None else entry.bounds


COUNTED = {FORGETTING: "forget", RETENTION: "retain"}
NOT_COUNTED = ("density_forget", "coverage_forget")  # a mean over samples, a share of real images


def counted_of(column: str) -> str | None:
    """The set of samples that a column is a share of, as `num_samples` names it; None where it is none of them."""
    entry = entry_of(column)
    if entry is None or entry.key != column or column in NOT_COUNTED or column.startswith("reached/"):
        return None
    return COUNTED.get(entry.about) if entry.made_by in ("Rates", "Outliers") else None


def key_of(column: str, prefix: str = "eval") -> str:
    """Where a column stands in a summary's metrics; `prefix` is eval, base or oracle."""
    return column if column.partition("/")[0] in OTHERS else f"{prefix}/{column}"


OTHERS = ("cost", "reached", "mean", "oracle_gap", "oracle_std", "gap_z", "base", "oracle", "floor")


def choose(wanted: Iterable[str], keys: set[str]) -> list[str]:
    """The columns that a user named, with or without `eval/`; `keys` are all keys of the runs' summaries.

    A metric that no run has is left out, if another is there. Raises ConfigurationError with the nearest names for what
    is no metric's name, and if no run has any of them.
    """
    there = {key.removeprefix("eval/") for key in keys}
    columns = {name.removeprefix("eval/"): name for name in wanted}
    chosen = [column for column in columns if column in there]
    for column, name in columns.items():
        if column not in there and (entry_of(column) is None or not chosen):
            raise ConfigurationError(f"no run has a metric '{name}'{near(column, there)}.")
    return chosen


def shown(keys: set[str], short: bool) -> list[str]:
    """The columns that any run has, of the short or of the whole list."""
    return [column for column in (HEADLINES if short else COLUMNS) if key_of(column) in keys]

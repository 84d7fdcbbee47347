"""The metrics of a comparison: their order, where each is best, which of them a short table shows."""

from collections.abc import Iterable

from unlearn_runner.errors import ConfigurationError, near

COLUMNS = (
    "forget_rate", "restored_rate", "retain_accuracy", "fid_forget", "fid_retain", "kid_forget", "kid_retain",
    "precision_retain", "recall_retain", "is_forget", "is_retain", "ssim_forget", "ssim_retain", "nll_forget",
    "nll_retain", "nll_bound_forget", "nll_bound_retain", "mia_auc", "mia_tpr_at_1pct_fpr", "relearn_steps",
    "forget_rate_paraphrases", "clip_score_retain", "fid_base_retain", "attack_success",
    "deletion_steps", "lasting_deletion_steps", "reached/steps", "reached/seconds", "reached/restored_rate",
    "reached/retain_accuracy", "reached/fid_retain", "reached/kid_retain",
    "mean/lambda/value", "mean/grad_variance/update", "mean/grad_variance/policy", "cost/seconds",
    "cost/network_evaluations", "cost/network_evaluations_per_sample", "cost/policy_network_evaluations",
    "cost/peak_memory_gb",
)  # fmt: skip
HEADLINES = (
    "forget_rate", "restored_rate", "retain_accuracy", "fid_retain", "ssim_retain", "nll_retain", "mia_auc",
    "relearn_steps", "clip_score_retain", "attack_success", "cost/seconds", "cost/network_evaluations",
    "cost/peak_memory_gb",
)  # fmt: skip

ORACLE = "oracle"  # best is what the model has that never saw the forget set
LOW, HIGH = "low", "high"
# As docs/metrics.md says. A metric without a line here has no good direction, and nothing of it is marked.
BETTER: dict[str, str | float] = {
    "forget_rate": LOW, "forget_rate_paraphrases": LOW, "attack_success": LOW, "restored_rate": HIGH,
    "retain_accuracy": HIGH, "fid_retain": LOW, "kid_retain": LOW, "precision_retain": HIGH, "recall_retain": HIGH,
    "is_retain": HIGH, "ssim_retain": HIGH, "nll_retain": LOW, "nll_bound_retain": LOW, "clip_score_retain": HIGH,
    "fid_base_retain": LOW,
    "fid_forget": ORACLE, "kid_forget": ORACLE, "nll_forget": ORACLE, "nll_bound_forget": ORACLE,
    "relearn_steps": ORACLE, "mia_auc": 0.5, "mia_tpr_at_1pct_fpr": 0.01, "deletion_steps": LOW,
    "lasting_deletion_steps": LOW, "steps": LOW, "seconds": LOW, "network_evaluations": LOW,
}  # fmt: skip


def better(column: str) -> str | float | None:
    """LOW, HIGH, ORACLE, the value that is best, or None where no direction is good.

    A column is a metric of `eval/` without that prefix, or any other key of a summary in full.
    """
    prefix, _, name = column.rpartition("/")
    if prefix in ("cost", "oracle_gap") or column.startswith("oracle_gap/"):
        return LOW
    return BETTER.get(name) if prefix in ("", "reached") else None


def key_of(column: str, prefix: str = "eval") -> str:
    """Where a column stands in a summary's metrics; `prefix` is eval, base or oracle."""
    return column if column.partition("/")[0] in OTHERS else f"{prefix}/{column}"


OTHERS = ("cost", "reached", "mean", "oracle_gap", "base", "oracle")


def choose(wanted: Iterable[str], keys: set[str]) -> list[str]:
    """The columns that a user named, with or without `eval/`; `keys` are all keys of the runs' summaries.

    Raises ConfigurationError with the nearest names for one that no run has.
    """
    there = {key.removeprefix("eval/") for key in keys}
    chosen = []
    for name in wanted:
        column = name.removeprefix("eval/")
        if column not in there:
            raise ConfigurationError(f"no run has a metric '{name}'{near(column, there)}.")
        chosen.append(column)
    return chosen


def shown(keys: set[str], short: bool) -> list[str]:
    """The columns that any run has, of the short or of the whole list."""
    return [column for column in (HEADLINES if short else COLUMNS) if key_of(column) in keys]

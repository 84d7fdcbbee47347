"""The default run does what README and docs/results.md say. Trains a real base: minutes."""

import pytest
from test_train import command, runs_below, summary

pytestmark = pytest.mark.slow


def test_default_run_unlearns_the_trousers_and_keeps_the_digits(tmp_path):
    done = command("logger=jsonl", "evaluation=full", outputs=tmp_path / "o", cache=tmp_path / "c", timeout=1800)
    assert done.returncode == 0, done.stderr
    (folder,) = runs_below(tmp_path / "o")
    metrics = summary(folder)["metrics"]
    for digit in "023456789":
        assert metrics[f"base/per_class/accuracy/{digit}"] >= 0.90, digit
    assert 0.3 <= metrics["base/forget_rate"] <= 0.7
    assert metrics["eval/forget_rate"] <= 0.05
    assert metrics["eval/restored_rate"] >= 0.85
    assert metrics["eval/retain_accuracy"] >= metrics["base/retain_accuracy"] - 0.03
    assert metrics["cost/peak_memory_gb"] <= 2.0

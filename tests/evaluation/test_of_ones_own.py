"""A metric is a class, an entry in a YAML and a line in the catalogue; a judge is a class and a YAML. Nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

METRIC = '''
"""How dark samples are."""

from typing import Any, final

from unlearn_runner.evaluation.metrics import Metric, Rows
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import UnitInterval


@final
class Darkness(Metric):
    """darkness_<group>: share of pixels below `level`, mean over samples."""

    version = 1
    paired = True

    def __init__(self, level: UnitInterval = 0.5):
        self.level = level

    def measure(self, view: View) -> Rows:
        return {name: (judged.images < 255 * self.level).double().flatten(1).mean(1)
                for name, judged in view.judged.items()}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {f"darkness_{name}": float(table.mean()) for name, table in samples.grouped(rows, False).items()}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"level": self.level}
'''
LINES = """    Entry("darkness_retain", "Darkness", LOW, SHARE, RETENTION, RUN | LONG | SHORT, "share of dark pixels"),
    Entry("darkness_forget", "Darkness", None, SHARE, FORGETTING, NOTHING, "share of dark pixels"),
"""
JUDGE = '''
"""Names a picture after the content whose mean it is nearest to."""

from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F

from unlearn_runner.cache import digest
from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.evaluation.judge import Judge, Judged, JudgeRecipe
from unlearn_runner.options import PositiveInt


@final
class NearestMean(Judge):
    def __init__(self, means: torch.Tensor, side: int, device: torch.device):
        self.means, self.side, self.device = means, side, device

    def __call__(self, images, batch_size: int = 128) -> Judged:
        features = small(images, self.side)
        logits = -torch.cdist(features, self.means)
        return Judged(images.cpu(), features, logits, logits)

    @property
    def num_features(self) -> int:
        return self.side**2

    @property
    def fingerprint(self) -> str:
        return digest({"means": self.means})

    def doubts(self) -> list[str]:
        return []

    def provenance(self) -> dict[str, Any]:
        return {"extractor": "nearest mean", "side": self.side}


@final
class Means(JudgeRecipe):
    max_steps = 0

    def __init__(self, side: PositiveInt = 3):
        self.side, self.num_features = side, side**2

    def judge(self, data: ForgetRetain, cache_dir: Path, device: torch.device, show=None) -> NearestMean:
        pictures = [(part.pixels, part.contents) for part in (data.retain, data.forget)]
        features = small(torch.cat([pixels for pixels, _ in pictures]), self.side)
        contents = torch.cat([of for _, of in pictures])
        means = [features[contents == content].mean(0) for content in range(len(data.spec.content_names))]
        return NearestMean(torch.stack(means), self.side, device)


def small(images, side: int):
    return F.adaptive_avg_pool2d(to_unit_range(images.cpu()), side).mean(1).flatten(1)
'''


@pytest.fixture
def extended(tmp_path):
    """A copy of the runner with a metric and a judge of one's own, in the files that a newcomer would write."""
    for name in ("unlearn_runner", "conf", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "unlearn_runner/evaluation/darkness.py").write_text(METRIC.lstrip())
    (tmp_path / "conf/evaluation/dark.yaml").write_text(
        "defaults:\n  - quick\n  - _self_\nmetrics:\n  darkness:\n"
        "    _target_: unlearn_runner.evaluation.darkness.Darkness\n    level: 0.25\n"
    )
    catalogue = tmp_path / "unlearn_runner/catalogue.py"
    before, bracket, after = catalogue.read_text().partition("ENTRIES = (\n")
    catalogue.write_text(before + bracket + LINES + after)
    (tmp_path / "unlearn_runner/evaluation/means.py").write_text(JUDGE.lstrip())
    (tmp_path / "conf/judge/means.yaml").write_text("_target_: unlearn_runner.evaluation.means.Means\nside: 3\n")
    return tmp_path


def command(folder, *arguments):
    surroundings = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=surroundings, capture_output=True, text=True)


def test_a_metric_and_a_judge_of_ones_own(extended):
    shared = ("debug=default", "logger=jsonl", "hardware=cpu", "method=naive_deletion", "evaluation.every=null",
              "judge=means", "evaluation=dark")  # fmt: skip
    done = command(
        extended, "train.py", *shared, "paths.cache=cache", "hydra.run.dir=runs/one", "evaluation.bootstrap=20",
        "objective=eval/darkness_retain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "darkness_retain" in done.stdout, "the table at the end"
    summary = json.loads((extended / "runs/one/summary.json").read_text())
    low, high = summary["intervals"]["eval/darkness_retain"]
    assert 0 <= low <= summary["metrics"]["eval/darkness_retain"] <= high <= 1
    measured = summary["provenance"]["evaluation"]
    assert measured["metrics"]["darkness"] == {"level": 0.25, "version": 1}
    assert measured["features"].pop("abstains")["abstain"] == 0.05, "whatever the judge"
    assert measured["features"] == {"extractor": "nearest mean", "side": 3}
    assert not list((extended / "cache").glob("classifiers/*"))
    assert summary["metrics"]["base/forget_rate"] >= 0

    table = command(extended, "scripts/compare.py", "runs")
    assert "darkness_retain ↓" in table.stdout, table.stderr
    assert "darkness_forget" not in table.stdout
    documented = command(extended, "-m", "unlearn_runner.catalogue")
    assert "| `darkness_retain`, `darkness_forget` | share of dark pixels | low, - |" in documented.stdout

    refused = command(extended, "train.py", *shared, "evaluation.metrics.darkness.level=1.5")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "evaluation.metrics.darkness.level must be a number in [0, 1], got 1.5."
    refused = command(extended, "train.py", *shared, "judge.side=0")
    assert refused.stderr.strip() == "judge.side must be a whole number above 0, got 0."

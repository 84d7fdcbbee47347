"""The catalogue of keys: nothing heavy, nothing twice, what the docs say, what runs measure."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from unlearn_runner.catalogue import (
    COST,
    ENTRIES,
    FORGETTING,
    HIGH,
    LOW,
    RETENTION,
    In,
    entry_of,
    keys,
    made_by,
    markdown,
    title,
    what_z_says,
    z_of,
)
from unlearn_runner.comparison.columns import better, key_of
from unlearn_runner.comparison.packs import runs_in
from unlearn_runner.comparison.verdicts import QUESTIONS


def published():
    """The keys of all published summaries, those of base and oracle as those of the unlearned model."""
    for file in (ROOT / "docs" / "runs").iterdir():
        for _, texts in runs_in(file):
            for key, value in json.loads(texts["summary.json"])["metrics"].items():
                prefix, _, rest = key.partition("/")
                yield rest if prefix in ("eval", "base", "oracle") else key, value


def test_z_is_the_distance_in_standard_deviations_of_several_oracles():
    assert z_of("forget_rate", 4.0, [1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert z_of("forget_rate", 0.0, [1.0, 3.0]) == pytest.approx(-(2**0.5))
    assert z_of("forget_rate", 4.0, [1.0]) is None
    assert z_of("forget_rate", 4.0, []) is None
    assert z_of("forget_rate", 4.0, [0.0, 0.0, 0.0]) is None
    assert z_of("forget_rate", 4.0, [0.3, 0.1 + 0.2, 0.3]) is None, "they differ by rounding"
    assert z_of("forget_rate", 2e-6, [0.0, 1e-6, 2e-6]) == pytest.approx(1.0), "small, but no rounding"
    for key in ("ssim_retain", "per_class/ssim/seven", "fid_base_retain", "per_class/fid_base/seven"):
        assert z_of(key, 4.0, [1.0, 2.0, 3.0]) is None, "an oracle is not meant to draw what the base draws"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_more_oracle_lies_within_what_is_said_of_z(count):
    """In 95 % of cases, of normal scores."""
    limit = float(re.search(r"within ±([\d.]+) in 95 %", what_z_says(count))[1])
    rng = np.random.default_rng(count)
    drawn = rng.normal(size=(20_000, count + 1))
    z = (drawn[:, 0] - drawn[:, 1:].mean(1)) / drawn[:, 1:].std(1, ddof=1)
    assert np.mean(np.abs(z) <= limit) == pytest.approx(0.95, abs=0.006)
    assert f"the {count} oracles" in what_z_says(count)


def test_the_docs_have_its_table():
    assert markdown() in (ROOT / "docs" / "metrics.md").read_text()


def test_each_key_has_one_line_and_a_sentence():
    assert len({entry.key for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.sentence, entry.key
        assert entry.better in (None, LOW, HIGH, "oracle") or entry.bounds[0] <= entry.better <= entry.bounds[1]
        if In.PLOT in entry.shown and entry.about != COST:
            assert entry.better in (LOW, HIGH), f"{entry.key}: an axis has a better end"
            assert entry.better == LOW or math.isfinite(entry.bounds[1]), f"{entry.key}: or there is no ideal"


def test_every_published_score_is_known_and_within_its_bounds():
    unknown = set()
    for key, value in published():
        entry = entry_of(key)
        if entry is None:
            unknown.add(key.split("/")[0])
        else:
            assert entry.bounds[0] - 1e-6 <= value <= entry.bounds[1] + 1e-6, key
    assert unknown <= {"oracle_gap", "mean"}, "differences and averages, of whatever a method logs"


def test_where_a_key_is_shown():
    assert keys(In.SHORT)[:4] == ("forget_rate", "restored_rate", "nothing_rate", "retain_accuracy")
    assert set(keys(In.SHORT)) <= set(keys(In.LONG))
    assert all(key_of(key) == f"eval/{key}" for key in keys(In.RUN)), "what a run ends with is of its model"
    assert keys(In.PLOT, FORGETTING) == ("forget_rate", "restored_rate", "forget_rate_paraphrases")
    assert set(keys(In.PLOT, RETENTION)) == {
        "retain_accuracy", "fid_retain", "ssim_retain", "precision_retain", "recall_retain",
    }  # fmt: skip
    for columns in QUESTIONS.values():
        assert all(better(column) in (LOW, HIGH) for column in columns)


@pytest.mark.parametrize(
    ("column", "way"),
    [
        ("forget_rate", LOW), ("reached/forget_rate", LOW), ("reached/steps", LOW), ("cost/anything", LOW),
        ("oracle_gap/per_class/fid/3", LOW), ("mia_auc", 0.5), ("nll_forget", "oracle"), ("per_class/fid/3", None),
        ("base/forget_rate", None), ("of_ones_own", None), ("reached/of_ones_own", None),
    ],
)  # fmt: skip
def test_which_way_is_better(column, way):
    assert better(column) == way


def test_keys_by_the_class_that_makes_them():
    assert made_by("SSIM") == ("ssim_forget", "ssim_retain", "per_class/ssim/*")
    assert made_by("RunRecorder") == ("deletion_steps", "lasting_deletion_steps")
    assert made_by("Mine") == ()


def test_nothing_heavy_is_imported():
    code = "import sys, unlearn_runner.catalogue; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("key", "extractor", "called"),
    [
        ("fid_retain", "classifiers/1a2b", "fid_retain (own features)"),
        ("eval/kid_forget", "classifiers/1a2b", "eval/kid_forget (own features)"),
        ("reached/fid_retain", "nearest mean", "reached/fid_retain (own features)"),
        ("oracle_gap/is_retain", "classifiers/1a2b", "oracle_gap/is_retain (own features)"),
        ("precision_retain", "efficientnet-lite0 (ImageNet)", "precision_retain (EfficientNet features)"),
        ("fid_retain", "torch-fidelity weights.pth", "fid_retain"),
        ("cmmd_retain", "open_clip ViT-B-32", "cmmd_retain"), ("forget_rate", "classifiers/1a2b", "forget_rate"),
        ("precision_forget", "classifiers/1a2b", "precision_forget"), ("fid_retain", None, "fid_retain"),
        ("of_ones_own", "classifiers/1a2b", "of_ones_own"),
    ],
)  # fmt: skip
def test_a_score_is_called_by_its_features(key, extractor, called):
    assert title(key, extractor) == called

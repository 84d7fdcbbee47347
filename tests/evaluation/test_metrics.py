"""Metrics against independent formulas."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch

from unlearn_runner.catalogue import made_by
from unlearn_runner.constructors import constant_of
from unlearn_runner.data.forget_retain import alike
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.evaluator import gap
from unlearn_runner.evaluation.judge import Judged
from unlearn_runner.evaluation.likelihood import NLL
from unlearn_runner.evaluation.membership import Membership
from unlearn_runner.evaluation.metrics import CMMD, FID, IS, KID, SSIM, PrecisionRecall, Rates, first_distinct
from unlearn_runner.evaluation.prompts import ClipScore, Paraphrases, Robustness
from unlearn_runner.evaluation.view import Group, Need, RealSamples, Samples, View, group_samples
from unlearn_runner.spec import DataSpec

SPEC = DataSpec("toy", (1, 16, 16), ("0", "1", "2"), ("0", "1", "2", "trousers"), (3,), 1, False)


def judged(n, seed, contents=None, d=8, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 16, 16), generator=g, dtype=torch.uint8)
    logits = torch.randn(n, 4, generator=g)
    if contents is not None:
        logits[torch.arange(n), torch.tensor(contents)] += 20
    return Judged(images, torch.randn(n, d, generator=g) + shift, logits, logits)


def samples(forget, retain, retain_labels, reference=None, spec=SPEC):
    forget_group, retain_group = Group(forget, reference), Group(retain, reference)
    places = {
        name: (kind, torch.arange(len(part)))
        for name, kind, part in (("forget", "forget", forget), ("retain", "retain", retain), ("/1", "forget", forget))
    }
    return Samples(spec, forget_group, retain_group, {"1": forget_group}, retain_labels, {"1": 1}, places)


def test_rates():
    forget = judged(10, 0, [3] * 4 + [1] * 5 + [0])
    retain = judged(8, 1, [0, 0, 0, 1, 2, 2, 2, 3])
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    scores = Rates().score(samples(forget, retain, labels), {})
    assert scores == {
        "forget_rate": 0.4, "restored_rate": 0.5, "other_rate": 0.1, "retain_accuracy": 0.75,
        "per_class/accuracy/1": 0.5,
    }, "a judge that cannot abstain says nothing of nothing"  # fmt: skip
    outlying = torch.tensor([2.0] * 3 + [0.5] * 5 + [1.5, 0.5])  # of 3, 3, 3, 3, 1, 1, 1, 1, 1, 0
    abstained = Rates().score(samples(replace(forget, outlying=outlying), retain, labels), {})
    rates = {name: abstained[f"{name}_rate"] for name in ("forget", "restored", "other", "nothing")}
    assert rates == {"forget": 0.1, "restored": 0.4, "other": 0.1, "nothing": 0.4}


def test_rates_without_labels_or_clean_class():
    spec = SPEC._replace(label_names=None)
    pool = judged(10, 0, [3] * 4 + [1] * 6)
    group = Group(pool, None)
    assert Rates().score(Samples(spec, group, group, {}, None, {}, {}), {}) == {
        "forget_rate": 0.4, "other_rate": 0.6,
    }  # fmt: skip
    whole_class = SPEC._replace(restored_content=None)
    assert "restored_rate" not in Rates().score(samples(pool, pool, torch.zeros(10).long(), spec=whole_class), {})


def test_rates_of_several_contents():
    """Two labels for the content 2 and one for 3; what is drawn under one of them may be the other."""
    prompts = ("zero", "one", "a two", "the two", "three")
    spec = DataSpec("toy", (1, 16, 16), prompts, ("0", "1", "2", "3"), (2, 3), None, False, (0, 1, 2, 2, 3))
    conditions = {"forget": torch.tensor([2, 2, 2, 3, 3, 3, 4, 4]), "retain": torch.tensor([0, 0, 1, 1])}
    drawn = {"forget": judged(8, 0, [2, 0, 3, 2, 1, 1, 3, 2]), "retain": judged(4, 1, [0, 0, 1, 3])}
    grouped = group_samples(spec, conditions, drawn, {})
    scores = Rates().score(grouped, {})
    assert scores["forget_rate"] == 5 / 8
    assert scores["other_rate"] == 3 / 8
    assert scores["retain_accuracy"] == 0.75
    assert scores["per_class/forget_rate/2"] == 3 / 6, "a three under a two's prompt is not forgotten"
    assert scores["per_class/forget_rate/3"] == 2 / 2
    assert scores["per_class/accuracy/three"] == 1 / 2
    assert [key for key in scores if key.startswith("per_class/forget_rate")] == [
        "per_class/forget_rate/2", "per_class/forget_rate/3",
    ]  # fmt: skip
    one = group_samples(spec._replace(forget_contents=(2,)), conditions, drawn, {})
    assert not [key for key in Rates().score(one, {}) if "per_class/forget_rate" in key]
    pool = Group(judged(10, 0, [3] * 4 + [1] * 5 + [2]), None)
    unconditional = spec._replace(label_names=None, label_contents=None)
    assert Rates().score(Samples(unconditional, pool, pool, {}, None, {}, {}), {}) == {
        "forget_rate": 0.5, "other_rate": 0.5,
    }  # fmt: skip


def test_fid_is_the_frechet_distance():
    forget, retain, reference = judged(200, 0, shift=1.0), judged(300, 1), judged(400, 2)
    scores = FID(per_class=True).score(samples(forget, retain, None, reference), {})

    def frechet(a, b):
        a, b = a.features.double().numpy(), b.features.double().numpy()
        ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = scipy.linalg.sqrtm(ca @ cb).real
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)

    assert scores["fid_forget"] == pytest.approx(frechet(forget, reference), rel=1e-6)
    assert scores["fid_retain"] == pytest.approx(frechet(retain, reference), rel=1e-6)
    assert scores["per_class/fid/1"] == scores["fid_forget"]

    before = judged(200, 3), judged(300, 4)
    drawn = samples(forget, retain, None)
    assert FID(against="base").score(drawn, {}) == {}, "the base has none before it"
    groups = (Group(part, None, earlier) for part, earlier in zip((forget, retain), before, strict=True))
    drawn = drawn._replace(**dict(zip(("forget", "retain"), groups, strict=True)))
    for _ in range(2):
        scores = FID(against="base").score(drawn, {})
        assert scores["fid_base_forget"] == pytest.approx(frechet(forget, before[0]), rel=1e-6)
        assert scores["fid_base_retain"] == pytest.approx(frechet(retain, before[1]), rel=1e-6)
    same = drawn._replace(retain=Group(retain, None, retain))
    assert FID(against="base").score(same, {})["fid_base_retain"] == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_mmd():
    forget, retain, reference = judged(60, 0, shift=0.5), judged(60, 1), judged(60, 2)
    scores = KID(min_samples=60, subset_size=60, subsets=1).score(samples(forget, retain, None, reference), {})

    def mmd(a, b):
        x, y = a.features.double().numpy(), b.features.double().numpy()
        n, d = x.shape
        kernel = lambda u, v: (u @ v.T / d + 1) ** 3  # noqa: E731
        off = lambda k: (k.sum() - np.trace(k)) / (n * (n - 1))  # noqa: E731
        return off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()

    assert scores["kid_forget"] == pytest.approx(mmd(forget, reference), rel=1e-4)
    assert scores["kid_retain"] == pytest.approx(mmd(retain, reference), rel=1e-2, abs=1e-4)


def test_cmmd_is_the_unbiased_mmd_of_embeddings():
    """Against the sums of 2401.09603's equation, pair by pair."""
    forget, retain, reference = judged(50, 0, shift=0.5), judged(40, 1), judged(60, 2)
    scores = CMMD(features="open_clip", min_samples=40, per_class=True).score(
        samples(forget, retain, None, reference), {}
    )

    def mmd(a, b):
        x, y = (part.features.double().numpy() for part in (a, b))
        x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, y))
        kernel = lambda u, v: np.exp(-((u[:, None] - v[None]) ** 2).sum(-1) / (2 * 10**2))  # noqa: E731
        off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
        return 1000 * (off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean())

    assert scores["cmmd_forget"] == pytest.approx(mmd(forget, reference), abs=1e-9)
    assert scores["cmmd_retain"] == pytest.approx(mmd(retain, reference), abs=1e-9)
    assert scores["per_class/cmmd/1"] == scores["cmmd_forget"] > scores["cmmd_retain"]


def test_cmmd_measures_nothing_in_other_features():
    drawn = samples(judged(200, 0), judged(200, 1), None, judged(200, 2))
    metric = CMMD(features="classifier")
    assert (metric.score(drawn, {}), metric.needs, metric.least(2048)) == ({}, (), 1)
    assert set(CMMD().score(drawn, {})) == {"cmmd_forget", "cmmd_retain"}, "of a judge of one's own"


def test_floors_of_real_images():
    """As many images of the references' distribution: FID's is what samples without any fault have on average, also
    where there are half as many; what cannot be said of fewer is left out.
    """
    reference = judged(2000, 100)

    def real(n, seed):
        group = Group(judged(n, seed), reference)
        return RealSamples(Samples(SPEC, group, group, {}, None, {}, {}), None, 400, None)

    truth = np.mean([FID().floor(real(400, seed))["fid_retain"] for seed in range(100)])
    scaled = np.mean([FID().floor(real(200, seed))["fid_retain"] for seed in range(100)])
    assert 0 < truth < 0.1
    assert scaled == pytest.approx(truth, rel=0.1)
    drawn = samples(judged(400, 0), judged(400, 0), None, reference)
    for metric in (FID(), KID(), CMMD(), PrecisionRecall()):
        floor = metric.floor(real(400, 0))
        assert floor == {key: value for key, value in metric.score(drawn, {}).items() if not key.startswith("per")}
    for metric in (KID(), CMMD(), PrecisionRecall()):
        assert metric.floor(real(200, 0)) == {}
    assert FID().floor(real(50, 0)) == {}, "too few even to begin with"


def test_kid_and_is_do_not_touch_the_global_generator():
    forget, retain, reference = judged(60, 0), judged(60, 1), judged(60, 2)
    drawn = samples(forget, retain, None, reference)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = KID(min_samples=60, subset_size=30).score(drawn, {}) | IS(splits=3).score(drawn, {})
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert KID(min_samples=60, subset_size=30).score(drawn, {}) | IS(splits=3).score(drawn, {}) == first


def test_inception_score():
    forget = judged(100, 0, [0] * 100)
    retain = judged(100, 1, [i % 4 for i in range(100)])
    scores = IS().score(samples(forget, retain, None), {})
    assert scores["is_forget"] == pytest.approx(1.0, abs=1e-3)
    assert scores["is_retain"] == pytest.approx(4.0, abs=1e-2)
    p = retain.logits.double().softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert scores["is_retain"] == pytest.approx(expected, rel=1e-4)


def test_inception_score_of_an_extractor_with_logits():
    pool = replace(judged(100, 0, [0] * 100), is_logits=20.0 * torch.eye(5)[torch.arange(100) % 5])
    assert IS().score(samples(pool, pool, None), {})["is_forget"] == pytest.approx(5.0, abs=1e-3)


def test_ssim_compares_with_the_base_row_by_row():
    a, b = judged(6, 0), judged(6, 1)
    metric = SSIM(per_class=True)
    view = View.__new__(View)  # SSIM asks for the samples alone
    view.judged, view.base_samples = {"forget": a, "retain": b}, None
    assert {name: rows.tolist() for name, rows in metric.measure(view).items()} == dict.fromkeys(view.judged, [1.0] * 6)
    view.base_samples = {"forget": a, "retain": a}
    rows = metric.measure(view)
    assert torch.equal(rows["retain"], metric.compare(b, a))
    drawn = samples(a, b, None)
    scores = metric.score(drawn, rows)
    assert scores["ssim_forget"] == pytest.approx(1.0)
    assert scores["ssim_retain"] < 0.2
    assert scores["per_class/ssim/1"] == scores["ssim_forget"]
    half = metric.compare(a, replace(b, images=torch.cat([a.images[:3], b.images[3:]])))
    assert half[:3].tolist() == pytest.approx([1.0] * 3)
    assert half[3:].max() < 0.5
    rows_of = {"forget": torch.arange(3), "retain": torch.arange(3, 6), "/1": torch.tensor([5])}
    some = drawn._replace(places={name: ("forget", chosen) for name, chosen in rows_of.items()})
    scores = metric.score(some, {"forget": half})
    assert list(scores.values()) == pytest.approx([float(part.mean()) for part in (half[:3], half[3:], half[5:])])


def test_precision_and_recall():
    real = judged(300, 0)
    same = PrecisionRecall().score(samples(judged(300, 1), judged(300, 1), None, real), {})
    assert same["precision_retain"] > 0.6
    assert same["recall_retain"] > 0.6
    far = PrecisionRecall().score(samples(judged(300, 1), judged(300, 1, shift=20.0), None, real), {})
    assert far == {"precision_retain": 0.0, "recall_retain": 0.0}
    one_mode = judged(300, 1)
    one_mode = replace(one_mode, features=real.features[:1] + 1e-3 * one_mode.features)
    narrow = PrecisionRecall().score(samples(one_mode, one_mode, None, real), {})
    assert narrow["precision_retain"] == 1.0
    assert narrow["recall_retain"] < 0.05


def test_too_few_references_get_no_distance():
    few, many = judged(30, 2), judged(400, 0)
    drawn = samples(many, many, None, few)
    for metric in (FID(), KID(), PrecisionRecall()):
        assert metric.score(drawn, {}) == {}
    assert set(FID(min_samples=30).score(drawn, {})) == {"fid_forget", "fid_retain"}
    assert FID(min_samples=100).least(64) == 100
    assert FID(min_samples=100).least(2048) == 2049, "fewer samples than features: a singular covariance"


def test_first_distinct_takes_each_picture_once():
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2).repeat(4, 1, 1, 1)
    images = alike(pixels.contiguous(), 0, 0)
    assert len(first_distinct(images, 10, 0)) == 5
    assert len(first_distinct(images, 3, 0)) == 3
    assert torch.equal(first_distinct(images, 3, 1).pixels, first_distinct(images, 3, 1).pixels)


@pytest.mark.parametrize(
    "build",
    [
        lambda: KID(subset_size=100, min_samples=50),
        lambda: PrecisionRecall(min_samples=3),
    ],
)
def test_refuses(build):
    with pytest.raises(ConfigurationError, match=r"evaluation\.metrics"):
        build()


ALL = (CMMD, FID, IS, KID, SSIM, PrecisionRecall, Rates, NLL, Membership, Paraphrases, ClipScore, Robustness)


@pytest.mark.parametrize("kind", ALL)
def test_each_metric_declares_itself(kind):
    """Its version, its needs as they are read without importing it, and its keys in the catalogue."""
    assert kind.version >= 1
    assert set(kind.needs) <= set(get_args(Need))
    declared = constant_of(f"{kind.__module__}.{kind.__name__}", "needs")
    assert tuple(declared or ()) == tuple(kind.needs)
    assert made_by(kind.__name__)
    assert set(kind.held_out.values()) <= {"forget_test", "retain_test"}


def test_gap_is_over_what_both_have():
    assert gap({"a": 0.2, "b": 1.0}, {"a": 0.5, "c": 1.0}) == {"a": pytest.approx(0.3)}

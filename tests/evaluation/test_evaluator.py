"""One evaluation: what is drawn, under which conditions, compared with what."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_bits
from safetensors.torch import load_file

from unlearn_runner.comparison.statistics import wilson
from unlearn_runner.data.digits import Digits
from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import ENOUGH_HELD_OUT, Evaluator, Sampling, require_enough_samples
from unlearn_runner.evaluation.judge import Judged
from unlearn_runner.evaluation.membership import Membership
from unlearn_runner.evaluation.metrics import FID, KID, SSIM, PrecisionRecall, Rates
from unlearn_runner.evaluation.view import Clock

CPU = torch.device("cpu")
FEW_FEATURES = ClassifierRecipe(num_features=8)  # FID needs more samples than features
METRICS = {"rates": Rates(), "fid": FID(min_samples=20), "ssim": SSIM(), "left out": None}
SAMPLING = Sampling(num_samples=27, num_inference_steps=2, batch_size=10)


@pytest.fixture(scope="module")
def judge(digits, shared_cache):
    return trained_judge(digits, FEW_FEATURES, shared_cache, CPU)


def test_classifier_knows_its_digits_and_is_cached(digits, judge, shared_cache):
    assert judge.test_accuracy["retain"] >= 0.97
    assert judge.test_accuracy["forget"] >= 0.97
    assert (judge(digits.forget_test.pixels).contents == 10).float().mean() >= 0.97
    again = trained_judge(digits, FEW_FEATURES, shared_cache, CPU)
    assert again.recognizer.name == judge.recognizer.name
    assert torch.equal(again(digits.retain_test.pixels).logits, judge(digits.retain_test.pixels).logits)
    seen = []
    recipe = ClassifierRecipe(max_steps=12)
    other = trained_judge(digits, recipe, shared_cache, CPU, show=lambda step, values: seen.append((step, values)))
    assert other.recognizer.name != judge.recognizer.name
    assert [(step, values["images"]) for step, values in seen] == [(10, 1280), (12, 1536)]


def test_same_model_same_scores(digits, judge, tiny_network, shared_cache):
    evaluator = Evaluator(digits, judge, METRICS, SAMPLING, shared_cache)
    network = tiny_network(image_shape=(1, 16, 16))
    first = evaluator(network)
    torch.manual_seed(123)
    second = evaluator(network, first.judged)
    assert second.scores == pytest.approx(first.scores, abs=1e-6)
    assert torch.equal(first.grid, second.grid)
    assert {"forget_rate", "restored_rate", "retain_accuracy", "fid_forget", "fid_retain"} <= set(first.scores)


def test_conditions(digits, judge, tiny_network, shared_cache):
    evaluator = Evaluator(digits, judge, METRICS, SAMPLING, shared_cache)
    conditions = evaluator.conditions
    assert conditions["forget"].tolist() == [1] * 27
    assert conditions["retain"].tolist() == [label for label in (0, 2, 3, 4, 5, 6, 7, 8, 9) for _ in range(3)]
    evaluation = evaluator(tiny_network(image_shape=(1, 16, 16)))
    assert evaluation.grid_columns == 3
    assert len(evaluation.grid) == 30
    assert len(evaluator.references["retain"]) == int((digits.retain.labels != 1).sum())
    assert len(evaluator.references["/1"]) == int((digits.retain.labels == 1).sum())


def test_several_contents_are_drawn_evenly_and_compared_with_their_own_images(shared_cache, tiny_network):
    data = Digits(forget_class=[3, 7]).load()
    judge = trained_judge(data, ClassifierRecipe(max_steps=5, num_features=8), shared_cache, CPU)
    sampling = Sampling(num_samples=24, num_inference_steps=2, bootstrap=20)
    evaluator = Evaluator(data, judge, METRICS, sampling, shared_cache)
    assert evaluator.conditions["forget"].tolist() == [3] * 12 + [7] * 12
    assert evaluator.conditions["retain"].unique().tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert evaluator.forget_rows == [3, 7]
    evaluation = evaluator(tiny_network(image_shape=(1, 16, 16)))
    apart = [evaluation.scores[f"per_class/forget_rate/{name}"] for name in ("3", "7")]
    assert evaluation.scores["forget_rate"] == pytest.approx(sum(apart) / 2)
    for name, rate in zip(("3", "7"), apart, strict=True):
        assert evaluation.intervals[f"per_class/forget_rate/{name}"] == list(wilson(rate, 12))
    for digit in (3, 7):
        own = evaluator.references["forget"].select(data.forget.labels == digit)
        assert torch.equal(evaluator.references[f"/{digit}"].features, own.features)


def test_unconditional_models_have_one_pool(shared_cache, tiny_network):
    data = DigitsTrousers(conditional=False).load()
    judge = trained_judge(data, ClassifierRecipe(max_steps=5, num_features=8), shared_cache, CPU)
    evaluation = Evaluator(data, judge, METRICS, SAMPLING, shared_cache)(
        tiny_network(image_shape=(1, 16, 16), num_labels=None)
    )
    assert set(evaluation.judged) == {"all"}
    assert "retain_accuracy" not in evaluation.scores
    assert "fid_retain" in evaluation.scores


def test_provenance_names_what_scores_depend_on(digits, judge, shared_cache, tiny_network):
    provenance = Evaluator(digits, judge, METRICS, SAMPLING, shared_cache).provenance(tiny_network())
    assert provenance["features"]["extractor"].startswith("classifiers/")
    assert provenance["num_samples"] == {"forget": 27, "retain": 27}
    for key in ("sampler", "num_inference_steps", "guidance_scale", "seed", "metrics"):
        assert key in provenance


def test_an_evaluation_is_made_once(digits, judge, tiny_network, tmp_path):
    images = Membership(num_images=5, timesteps=[100])
    evaluator = Evaluator(digits, judge, METRICS | {"mia": images}, SAMPLING, tmp_path)
    network = tiny_network(image_shape=(1, 16, 16))
    first = evaluator.once(network)
    second = evaluator.once(network)
    assert second.scores == first.scores == evaluator(network).scores
    assert torch.equal(second.grid, first.grid)
    for name, judged in first.judged.items():
        assert_same_bits(judged.tensors(), second.judged[name].tensors())
    folder = tmp_path / "evaluations"
    assert len(list(folder.glob("*/evaluation.json"))) == 1
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    evaluator.once(network)
    evaluator.once(network, first.judged)
    Evaluator(digits, judge, METRICS, SAMPLING, tmp_path).once(network)
    assert len(list(folder.glob("*/evaluation.json"))) == 4, "other weights, other base, other metrics"
    references = [load_file(file) for file in tmp_path.glob("references/*/judged.safetensors")]
    assert sorted(len(tensors["logits"]) for tensors in references) == sorted([len(digits.retain), len(digits.forget)])


def test_intervals_lie_around_the_scores(digits, judge, tiny_network, shared_cache):
    """Of a share, Wilson's; of every score there is one but of those whose spread redrawing does not show."""
    sampling = Sampling(num_samples=200, num_inference_steps=2, bootstrap=20)
    metrics = METRICS | {
        "kid": KID(min_samples=50, subset_size=50), "mia": Membership(num_images=30, timesteps=[500]),
        "prc": PrecisionRecall(min_samples=50),
    }  # fmt: skip
    evaluator = Evaluator(digits, judge, metrics, sampling, shared_cache)
    network = tiny_network(image_shape=(1, 16, 16))
    evaluation = evaluator(network)
    without = {"kid_forget", "kid_retain", "recall_retain"}
    assert evaluation.intervals.keys() == evaluation.scores.keys() - without
    assert evaluation.intervals == evaluator(network).intervals

    half = torch.arange(200) % 2 == 0
    logits = torch.zeros(200, 11)
    logits[half, 10] = 9.0  # half of the samples are taken for trousers
    view = evaluator.view(network)
    view.judged["forget"] = replace(view.judged["forget"], logits=logits)
    rows = evaluator.measure(view, Clock())
    rows["mia"] = {"forget": torch.rand(100, 1), "unseen": torch.rand(100, 1) + 0.1}
    scores = evaluator._score(view.samples, rows, Clock())
    assert scores["forget_rate"] == 0.5
    often = Evaluator(digits, judge, metrics, replace(sampling, bootstrap=200), shared_cache)
    intervals = often._intervals(view, rows, scores)
    assert intervals["forget_rate"] == list(wilson(0.5, 200))
    assert intervals["restored_rate"] == list(wilson(0.0, 200)), "of some width at 0"
    low, high = intervals["ssim_retain"]
    table = rows["ssim"]["retain"]
    assert high - low == pytest.approx(2 * 1.96 * float(table.std()) / 200**0.5, rel=0.2, abs=1e-6)
    for key in ("fid_retain", "mia_auc"):
        assert intervals[key][0] < scores[key] < intervals[key][1], key
    assert intervals["mia_auc"][1] <= 1
    more = Evaluator(digits, judge, {"rates": Rates()}, Sampling(num_samples=200), shared_cache)
    assert more(network).intervals == {}


@pytest.mark.parametrize("shift", [pytest.param(0.0, marks=pytest.mark.slow), 0.3], ids=["near", "far"])
def test_an_interval_of_fid_is_as_wide_as_its_spread(digits, judge, tiny_network, shared_cache, shift):
    """Against the FID of many other sets of samples of the same distribution, as real images have it or farther off.

    A bootstrap's is 1.6 times as wide where samples and real images are alike.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) / 4

    def features(n):
        return torch.relu(torch.randn(n, 16, generator=generator) @ mix + 0.5)

    sampling = Sampling(num_samples=200, num_inference_steps=2, bootstrap=100, forget_only=True)
    evaluator = Evaluator(digits, judge, {"fid": FID(min_samples=50)}, sampling, shared_cache)
    view = evaluator.view(tiny_network(image_shape=(1, 16, 16)))
    (drawn,) = view.judged.values()
    many, images = features(2000), torch.zeros(2000, *drawn.images.shape[1:], dtype=torch.uint8)
    view.references = {"forget": Judged(images, many, torch.zeros(2000, 11), torch.zeros(2000, 11))}

    def redrawn():
        view.judged["forget"] = replace(drawn, features=features(200) + shift)
        view.__dict__.pop("samples", None)
        return evaluator._score(view.samples, {"fid": {}}, Clock())

    truth = torch.tensor([redrawn()["fid_forget"] for _ in range(300)]).double()
    widths, held = [], []
    for _ in range(40):
        scores = redrawn()
        low, high = evaluator._intervals(view, {"fid": {}}, scores)["fid_forget"]
        widths.append((high - low) / 2 / 1.96)
        held.append(low <= truth.mean() <= high)
    ratio = sum(widths) / len(widths) / truth.std()
    print(
        f"FID {truth.mean():.3f}: width of the interval / of the spread {ratio:.2f}, holds it {sum(held)} times of 40"
    )
    assert 0.9 <= ratio <= 1.15
    assert sum(held) >= 34


def test_too_few_samples_are_refused_with_a_sentence():
    require_enough_samples(METRICS, SAMPLING, 8, 10)
    with pytest.raises(ConfigurationError, match=r"evaluation\.metrics\.fid needs at least 65 samples .* gives 27"):
        require_enough_samples(METRICS, SAMPLING, 64, 10)
    with pytest.raises(ConfigurationError, match=r"for each class .* gives 3: .*fid\.per_class=false"):
        require_enough_samples({"fid": FID(per_class=True, min_samples=20)}, SAMPLING, 8, 10)
    require_enough_samples({"fid": FID(per_class=True, min_samples=20)}, SAMPLING, 8, None)


def test_too_few_references_are_said(digits, judge, shared_cache, tiny_network):
    evaluator = Evaluator(
        digits, judge, {"fid": FID(min_samples=20), "kid": KID(min_samples=500)}, SAMPLING, shared_cache
    )
    count = len(digits.forget)
    assert evaluator.left_out() == [f"kid of forget is left out: {count} real images, it needs 500."]
    assert evaluator.provenance(tiny_network())["left_out"] == evaluator.left_out()


def test_references_are_mirrored_where_training_mirrors(judge, shared_cache):
    data = DigitsTrousers(horizontal_flip=True).load()
    references = Evaluator(data, judge, METRICS, SAMPLING, shared_cache).references["forget"].features
    pixels = data.forget.pixels
    assert torch.allclose(references[0], judge(pixels[:1]).features[0], atol=1e-5)
    assert torch.allclose(references[1], judge(pixels[1:2].flip(-1)).features[0], atol=1e-5)
    assert not torch.allclose(references[1], judge(pixels[1:2]).features[0], atol=1e-3)


def test_nothing_is_made_that_no_metric_asks_for(digits, judge, tiny_network, shared_cache, monkeypatch):
    """Neither real images, where no metric compares with them, nor what a model cannot be asked."""
    evaluator = Evaluator(digits, judge, {"rates": Rates(), "ssim": SSIM()}, SAMPLING, shared_cache)
    monkeypatch.setattr(evaluator, "_real", lambda *_: pytest.fail("real images are judged"))
    assert evaluator(tiny_network(image_shape=(1, 16, 16))).scores.keys() >= {"forget_rate", "ssim_retain"}

    class OfTexts(Rates):
        needs = ("prompts", "clip")

        def measure(self, view):
            pytest.fail("it is asked")

    network = tiny_network(image_shape=(1, 16, 16))
    evaluator = Evaluator(digits, judge, {"mine": OfTexts(), "other": OfTexts()}, SAMPLING, shared_cache)
    assert evaluator(network).scores == {}
    assert evaluator.left_out_of(network) == ["mine, other left out: this model draws under no prompts."]


def test_rows_of_samples_are_redrawn_with_them(digits, judge, tiny_network, shared_cache):
    """A metric of rows that are the samples' sees the rows of the samples that were chosen for an interval."""
    seen = []

    class Paired(Rates):
        paired = True

        def measure(self, view):
            return {name: judged.logits for name, judged in view.judged.items()}

        def score(self, samples, rows):
            seen.append(torch.equal(rows["retain"], samples.retain.samples.logits))
            (table,) = [table for name, table in samples.grouped(rows, True).items() if name == "/3"]
            seen.append(torch.equal(table, samples.per_class["3"].samples.logits))
            return super().score(samples, rows)

    sampling = replace(SAMPLING, bootstrap=20)
    Evaluator(digits, judge, {"paired": Paired()}, sampling, shared_cache)(tiny_network(image_shape=(1, 16, 16)))
    assert len(seen) == 42
    assert all(seen)


def test_a_clock_counts_no_second_twice():
    clock = Clock()
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.05)
    assert 0.02 <= clock.seconds["outer"] < 0.05 <= clock.seconds["inner"]


def test_references_and_floors_are_of_different_images(digits, judge, tiny_network, tmp_path):
    """Held-out references: floors are training images', and the other way round; few held-out ones are no references
    unless they are asked for.
    """
    network, metrics = tiny_network(image_shape=(1, 16, 16)), {"fid": FID(min_samples=20)}
    floors = {}
    for references, held_out in (("training", False), ("auto", False), ("held_out", True)):
        evaluator = Evaluator(digits, judge, metrics, replace(SAMPLING, references=references), tmp_path)
        told = evaluator.provenance(network)
        kind = "held out" if held_out else "training"
        assert told["references"] == {"forget": kind, "retain": kind}
        images = digits.retain_test if held_out else digits.retain
        assert told["num_references"]["retain"] == int((images.labels != 1).sum())
        groups = evaluator._real_samples()
        of_others = evaluator._real("retain", not held_out)[0].features
        inside = (groups.retain.samples.features[:, None] == of_others[None]).all(-1).any(1)
        assert inside.all(), "as many other real images"
        floors[references] = evaluator.floor(network)
    assert floors["training"] == floors["auto"] != floors["held_out"]
    assert all(value > 0 for floor in floors.values() for value in floor.values())
    drawn = Evaluator(digits, judge, metrics, SAMPLING, tmp_path)(network).scores
    assert floors["training"]["fid_retain"] < drawn["fid_retain"], "of an untrained network"


def test_references_are_held_out_where_enough_images_are(judge, tiny_network, tmp_path):
    data = DigitsTrousers(test_fraction=0.8).load()
    assert len(data.forget_test) < ENOUGH_HELD_OUT <= len(data.retain_test)
    evaluator = Evaluator(data, judge, METRICS, replace(SAMPLING, references="auto"), tmp_path)
    told = evaluator.provenance(tiny_network(image_shape=(1, 16, 16)))
    assert told["references"] == {"forget": "training", "retain": "held out"}
    assert told["num_references"]["forget"] == len(data.forget)
    assert told["num_references"]["retain"] == int((data.retain_test.labels != 1).sum())


def test_held_out_references_that_are_not_there_are_refused(judge, tmp_path):
    data = DigitsTrousers(test_fraction=0.0).load()
    sampling = replace(SAMPLING, references="held_out")
    with pytest.raises(ConfigurationError, match=r"evaluation\.references=held_out: no image of \S+ is held out"):
        Evaluator(data, judge, METRICS, sampling, tmp_path)
    Evaluator(data, judge, {"rates": Rates()}, sampling, tmp_path)  # nothing is compared with them


@pytest.mark.parametrize("look", ["evaluation", "evaluation.at_threshold"])
def test_held_out_references_that_are_not_there_are_refused_before_a_base_is_trained(run, tmp_path, look):
    overrides = [f"paths.cache={tmp_path / 'cache'}", "dataset.test_fraction=0.0001"]
    if look == "evaluation":
        overrides.append("evaluation.references=held_out")
    else:
        look = "{_target_: unlearn_runner.training.evaluation.Look, metrics: ${evaluation.metrics}, sampling: {%s}}"
        fields = "_target_: unlearn_runner.evaluation.evaluator.Sampling, num_samples: 20, references: held_out"
        overrides.append(f"evaluation.at_threshold={look % fields}")
    with pytest.raises(ConfigurationError, match=r"evaluation\.references=held_out: no image of \S+ is held out"):
        run(*overrides)
    assert not (tmp_path / "cache").exists()

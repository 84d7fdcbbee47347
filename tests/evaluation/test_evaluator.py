"""One evaluation: what is drawn, under which conditions, compared with what."""

import pytest
import torch

from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import Evaluator, Sampling
from unlearn_runner.evaluation.metrics import FID, SSIM, Rates

CPU = torch.device("cpu")
METRICS = {"rates": Rates(), "fid": FID(min_samples=20), "ssim": SSIM()}
SAMPLING = Sampling(num_samples=27, num_inference_steps=2, batch_size=10)


@pytest.fixture(scope="module")
def judge(digits, shared_cache):
    return trained_judge(digits, ClassifierRecipe(), shared_cache, CPU)


def test_classifier_knows_its_digits_and_is_cached(digits, judge, shared_cache):
    assert judge.test_accuracy >= 0.97
    assert (judge(digits.forget_test.pixels).contents == 10).float().mean() >= 0.97
    again = trained_judge(digits, ClassifierRecipe(), shared_cache, CPU)
    assert again.weights == judge.weights
    assert torch.equal(again(digits.retain_test.pixels).logits, judge(digits.retain_test.pixels).logits)
    other = trained_judge(digits, ClassifierRecipe(max_steps=2), shared_cache, CPU)
    assert other.weights != judge.weights


def test_same_model_same_scores(digits, judge, tiny_network):
    evaluator = Evaluator(digits, judge, METRICS, SAMPLING)
    network = tiny_network(image_shape=(1, 16, 16))
    first = evaluator(network)
    torch.manual_seed(123)
    second = evaluator(network, first.judged)
    assert second.scores == pytest.approx(first.scores, abs=1e-6)
    assert torch.equal(first.grid, second.grid)
    assert {"forget_rate", "restored_rate", "retain_accuracy", "fid_forget", "fid_retain"} <= set(first.scores)


def test_conditions(digits, judge, tiny_network):
    evaluator = Evaluator(digits, judge, METRICS, SAMPLING)
    conditions = evaluator._conditions()
    assert conditions["forget"].tolist() == [1] * 27
    assert conditions["retain"].tolist() == [label for label in (0, 2, 3, 4, 5, 6, 7, 8, 9) for _ in range(3)]
    evaluation = evaluator(tiny_network(image_shape=(1, 16, 16)))
    assert evaluation.grid_columns == 3
    assert len(evaluation.grid) == 30
    assert len(evaluator.references["retain"]) == int((digits.retain.labels != 1).sum())
    assert len(evaluator.references["/1"]) == int((digits.retain.labels == 1).sum())


def test_unconditional_models_have_one_pool(shared_cache, tiny_network):
    data = DigitsTrousers(conditional=False).load()
    judge = trained_judge(data, ClassifierRecipe(max_steps=5), shared_cache, CPU)
    evaluation = Evaluator(data, judge, METRICS, SAMPLING)(tiny_network(image_shape=(1, 16, 16), num_labels=None))
    assert set(evaluation.judged) == {"all"}
    assert "retain_accuracy" not in evaluation.scores
    assert "fid_retain" in evaluation.scores


def test_provenance_names_what_scores_depend_on(digits, judge):
    provenance = Evaluator(digits, judge, METRICS, SAMPLING).provenance()
    assert provenance["features"]["extractor"].startswith("classifiers/")
    assert provenance["num_samples"] == {"forget": 27, "retain": 27}
    for key in ("sampler", "num_inference_steps", "guidance_scale", "seed", "metrics"):
        assert key in provenance


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"sampler": "euler"}, {"num_inference_steps": -1}])
def test_sampling_refuses(settings):
    with pytest.raises(ConfigurationError, match=r"evaluation\."):
        Sampling(**settings)

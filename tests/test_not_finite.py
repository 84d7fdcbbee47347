"""What is not a finite number is no result: it is found, counted and said, and never stands in a file."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from pipelines import tiny
from safetensors.torch import load_file, save_file
from trainers import CPU, build_trainer

from unlearn_runner.assembly import build_network
from unlearn_runner.cache import write_json
from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.evaluation.classifier import Classifier, ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import Evaluator, Sampling
from unlearn_runner.evaluation.judge import RecognizingJudge
from unlearn_runner.evaluation.likelihood import flow_bits_per_dim
from unlearn_runner.evaluation.metrics import FID, KID, Rates
from unlearn_runner.methods.siss.passes import effective_sample_size
from unlearn_runner.models.model import require_finite
from unlearn_runner.training.clock import Listener

NAN = math.nan


def strictly(path: Path) -> dict:
    """JSON as it is defined, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def strict_lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


def spoilt(network: torch.nn.Module, value: float = NAN) -> None:
    with torch.no_grad():
        list(network.parameters())[-1].view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_pictures_that_are_not_finite_never_become_bytes(value):
    images = torch.zeros(4, 1, 2, 2)
    assert to_uint8(images).unique().tolist() == [128]
    images[1, 0, 1, 1] = images[3, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="2 of 4 pictures hold values that are not finite numbers"):
        to_uint8(images)


@pytest.mark.parametrize("value", [NAN, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_model_with_one_spoilt_weight_is_not_scored(digits, tiny_network, tiny_vae, shared_cache, tmp_path, value):
    """Of pixels it had a forget_rate and a precision of 1, of Stable Diffusion a forget_rate of 0."""
    recipe = ClassifierRecipe(max_steps=1, num_features=8)
    sampling = Sampling(num_samples=10, num_inference_steps=1)
    concepts = SDConcepts("trousers", ["a seven"], ["{}"], ["a picture of {}"], str(tmp_path))
    for data, model, network in (
        (digits, tiny_network(image_shape=(1, 16, 16)), "backbone.unet"),
        (digits, tiny_vae(image_shape=(1, 16, 16)), "vae"),
        (concepts.load(), tiny(prompts=concepts.spec.label_names), "backbone.unet"),
        (concepts.load(), tiny(prompts=concepts.spec.label_names), "codec.vae"),
    ):
        evaluator = Evaluator(data, trained_judge(data, recipe, shared_cache, CPU), {"r": Rates()}, sampling, tmp_path)
        require_finite(model, "the model")
        spoilt(model.get_submodule(network), value)
        with pytest.raises(
            NonFiniteError, match=r"the model has weights that are not finite numbers, 1 of \d+, the first"
        ):
            require_finite(model, "the model")
        if value == math.inf and network.endswith("vae"):
            continue  # beyond its tanh, or its clipping, nothing is infinite
        with pytest.raises(NonFiniteError, match=r"\d+ of 10 pictures drawn under the \w+ conditions hold"):
            evaluator.once(model)


def test_a_diagnostic_ends_no_run_and_a_loss_does(composed, digits, tmp_path):
    logged = []
    listeners = {"test": Listener(logged=lambda clock, values: logged.append(values))}
    trainer = build_trainer(composed("method=siss"), digits, tmp_path, listeners=listeners)
    step = trainer.method.step
    for key in ("weights/ess_reuse", "lambda/kl", "grad_variance/update", "mixture/kl"):
        trainer.method.step = lambda batch, key=key: step(batch) | {key: torch.tensor(NAN)}
        trainer.step()
        assert math.isnan(logged[-1][key])
    trainer.reset()
    trainer.method.step = lambda batch: step(batch) | {"grad_norm/retain": torch.tensor(math.inf)}
    with pytest.raises(NonFiniteError, match="grad_norm/retain became inf at step 5"):
        trainer.step()
    assert effective_sample_size(torch.zeros(3)) == 0


def test_spoilt_weights_are_not_saved(composed, digits, tmp_path):
    """A last step may have finite losses and leave weights that are not."""
    trainer = build_trainer(composed("method=siss", "trainer.max_steps=2"), digits, tmp_path)
    trainer.step()
    kept, step = trainer.save(), trainer.method.step

    def spoil(batch):
        metrics = step(batch)
        spoilt(trainer.method.networks[0])
        return metrics

    trainer.method.step = spoil
    with pytest.raises(NonFiniteError, match="after step 2 the model has weights that are not finite"):
        trainer.step()
    assert trainer.checkpoints.all() == [kept]


def test_a_spoilt_base_is_refused_before_anything_is_unlearned(run, composed, tmp_path):
    cfg = composed()
    network = build_network(cfg, DigitsTrousers().spec, 0)
    network.save(tmp_path / "base")
    [file] = tmp_path.glob("base/unet/*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = NAN
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        ConfigurationError, match=r"model\.weights=.*, 1 of .*, the first in unet\.conv_out\.bias; give"
    ):
        run(f"model.weights={tmp_path / 'base'}")
    assert strictly(tmp_path / "outputs" / "run" / "summary.json")["status"] == "failed"
    with pytest.raises(
        (InstantiationException, NonFiniteError), match=r"method\.weights=.* has values that are not finite"
    ):
        run("method=given", f"method.weights={tmp_path / 'base'}", folder="given")
    assert not (tmp_path / "outputs" / "given" / "model").exists()


@pytest.mark.slow
def test_a_model_that_draws_nothing_finite_has_diverged(run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"the unlearned model has diverged: \d+ of 20 pictures drawn under the"):
        run("method=neg_grad", "method.update.optimizer.lr=1e30", "trainer.max_steps=1")
    content = strictly(tmp_path / "outputs" / "run" / "summary.json")
    assert content["status"] == "diverged"
    assert not [key for key in content["metrics"] if key.startswith("eval/")]


@pytest.mark.parametrize("headline", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_that_are_not_finite_are_left_out_and_said(run, tmp_path, monkeypatch, capsys, headline):
    """A headline score among them: the run has diverged, with all else on record."""
    compute = KID.score
    monkeypatch.setattr(KID, "score", lambda self, *given: compute(self, *given) | {"kid_forget": math.inf})
    if headline:
        monkeypatch.setattr(FID, "_distance", lambda self, *pair: NAN)
        sentence = r"^eval/fid_retain: not a finite number, all else that was measured is in \S+$"
        with pytest.raises(NonFiniteError, match=sentence):
            run("evaluation.bootstrap=20")
    else:
        run("evaluation.bootstrap=20", "evaluation.seed=1")  # of the base's scores of the other case none is cached
    folder = tmp_path / "outputs" / "run"
    content = strictly(folder / "summary.json")
    assert content["status"] == ("diverged" if headline else "finished")
    lost = ["fid_forget", "fid_retain", "kid_forget"] if headline else ["kid_forget"]
    assert content["not_finite"] == [f"{prefix}/{key}" for prefix in ("base", "eval") for key in lost]
    scored = content["metrics"].keys() & content["intervals"].keys()
    assert {"eval/is_retain", "eval/forget_rate"} <= scored
    assert not scored & set(content["not_finite"])
    assert capsys.readouterr().out.count(f"{', '.join(content['not_finite'][len(lost) :])}: not a finite number") == 1
    strict_lines(folder)


def test_a_flow_that_cannot_be_followed_has_no_likelihood(tiny_network):
    network = tiny_network()
    spoilt(network.backbone.unet)
    images = torch.zeros(2, 1, 8, 8)
    found = flow_bits_per_dim(network, images, torch.zeros(2, dtype=torch.int64), torch.ones_like(images), 0.1, 0.1)
    assert found.isnan().tolist() == [True, True]


def test_no_json_holds_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": NAN, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN"})
    assert strictly(tmp_path / "x.json") == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN"}


def judge_of(test: dict[str, float], train: dict[str, float], contents: int) -> RecognizingJudge:
    return RecognizingJudge(Classifier(1, contents, 8, 8), CPU, None, test, train)


@pytest.mark.parametrize(
    ("test", "train", "contents", "doubted"),
    [
        ({"retain": 0.97, "forget": 0.9}, {}, 11, []),
        ({"retain": 0.1, "forget": 0.9}, {}, 10, [r"10% of the held-out retain images, guessing would 10%"]),
        ({"retain": 0.97, "forget": 0.0}, {}, 11, [r"0% of the held-out forget images, guessing would 9%"]),
        ({"retain": 0.97}, {"forget": 0.2}, 2, [r"20% of the training forget images, guessing would 50%"]),
        ({"retain": 0.76}, {"forget": 1.0}, 2, []),
        ({}, {"retain": 0.5, "forget": 0.5}, 2, ["training retain", "training forget"]),
        ({"retain": 0.985}, {}, 10, []),  # published before training images were asked about
    ],
)
def test_a_judge_that_did_not_learn_is_said(test, train, contents, doubted):
    judge = judge_of(test, train, contents)
    found = judge.doubts()
    assert len(found) == len(doubted)
    for sentence, part in zip(found, doubted, strict=True):
        assert part in sentence
    assert judge.provenance()["classifier_learnt"] is not bool(doubted)


def test_a_classifier_that_diverges_is_not_kept(digits, tmp_path):
    with pytest.raises(ConfigurationError, match=r"the classifier diverged .* judge\.classifier\.learning_rate"):
        trained_judge(digits, ClassifierRecipe(max_steps=3, num_features=8, learning_rate=1e30), tmp_path, CPU)
    assert not [path for path in tmp_path.glob("classifiers/*") if path.is_dir() and path.suffix != ".partial"]


FULL = (
    "evaluation=full", "evaluation.relearning.max_steps=1",
    *(f"evaluation.metrics.{setting}" for setting in (
        "nll.num_images=1", "nll.num_bound_images=2", "nll.num_timesteps=3", "nll.rtol=0.5", "nll.atol=0.5",
        "mia.timesteps=[100]", "fid.per_class=false", "kid.per_class=false",
    )),
)  # fmt: skip


@pytest.mark.parametrize("count", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 5, 9))])
def test_a_few_images_to_forget_have_the_scores_that_they_can_have(run, tmp_path, capsys, count):
    """Nothing is held out of fewer than ten."""
    for name, picture, images in (
        ("forget", Image.linear_gradient("L"), count),
        ("retain", Image.radial_gradient("L"), 4),
    ):
        (tmp_path / name).mkdir()
        for number in range(images):
            picture.rotate(20 * number, fillcolor=number).save(tmp_path / name / f"{number}.png")
    folder = run(
        "dataset=image_folder", "dataset.image_size=16", f"dataset.forget_dir={tmp_path / 'forget'}",
        f"dataset.retain_dir={tmp_path / 'retain'}", f"evaluation.bootstrap={'null' if count == 1 else 20}", *FULL,
    )  # fmt: skip
    content = strictly(folder / "summary.json")
    assert content["status"] == "finished"
    assert {"eval/forget_rate", "eval/nll_forget", "eval/ssim_retain", "eval/relearn_steps"} <= content[
        "metrics"
    ].keys()
    assert not [key for key in content["metrics"] if "mia" in key or "nll_retain" in key or "nll_bound_retain" in key]
    said = capsys.readouterr().out.replace("\n", " ")
    assert "mia is left out: no forget image is held out" in said
    assert "nll_retain is left out: no retained image is held out" in said
    strict_lines(folder)

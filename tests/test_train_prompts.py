"""Whole runs of a text-to-image model: base, CLIP, unlearning, evaluation, what is left in the folder."""

import json

import pytest
import torch
from conftest import COMPLETE
from diffusers import StableDiffusionPipeline

from unlearn_runner.assembly import build_method, build_network, make
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.evaluator import require_enough_samples
from unlearn_runner.types import make_generator

SMALL = (
    "dataset=sd_concepts", "model=sd_tiny", "evaluation=prompts", "dataset.retain_concepts=[a seven,a one]",
    "trainer.max_steps=2",
)  # fmt: skip
METHODS = [method for method in COMPLETE if method != "retrain"]
ROLLING = ("method=critic_guided", "method.num_inference_steps=3", "method.num_rollouts=8")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_experiment_composes_with_every_method(composed, method):
    cfg = composed("experiment=sd_trousers", f"method={method}", "seed=7", debug=False)
    assert cfg["name"] == "sd_trousers"
    pretraining = cfg["model"]["pretraining"]
    assert pretraining["seed"] == pretraining["autoencoder"]["seed"] == cfg["clip"]["training"]["seed"] == 7
    spec = make(cfg["dataset"]).spec
    network = build_network(cfg, spec, 0)
    network.freeze_for_unlearning()
    clip = make(cfg["clip"]["network"])
    built = build_method(cfg, network, spec, make_generator(0, "method"), clip)
    assert built.networks
    evaluation = make(cfg["evaluation"])
    require_enough_samples(evaluation.metrics, evaluation.sampling, 64, network.num_labels)


@pytest.mark.parametrize("method", [("method=siss",), ROLLING], ids=" ".join)
def test_run_on_pictures_that_come_with_the_runner(run, method):
    folder = run(*SMALL, *method)
    found = summary(folder)
    assert found["status"] == "finished"
    for key in ("forget_rate", "retain_accuracy", "forget_rate_paraphrases", "clip_score_retain", "attack_success"):
        assert {f"base/{key}", f"eval/{key}"} <= set(found["metrics"]), key
    assert "eval/fid_base_retain" in found["metrics"]
    assert "base/fid_base_retain" not in found["metrics"]
    provenance = found["provenance"]["evaluation"]
    assert provenance["guidance_scale"] == 2.0
    assert provenance["clip"] == "small_clip"
    assert "a photo of trousers" in provenance["metrics"]["paraphrases"]["prompts"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a picture of a seven", height=16, width=16, num_inference_steps=2, output_type="pt").images
    assert pictures.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("method", ["uce", "naive_deletion"])
def test_several_concepts_are_forgotten_in_one_run(run, method):
    concepts = ("trousers", "a two")
    found = summary(run(*SMALL, f"dataset.concept=[{','.join(concepts)}]", f"method={method}"))
    assert found["status"] == "finished"
    for rate in ("forget_rate", "forget_rate_paraphrases"):
        apart = [found["metrics"][f"eval/per_class/{rate}/{concept}"] for concept in concepts]
        assert found["metrics"][f"eval/{rate}"] == pytest.approx(sum(apart) / 2)
    assert found["metrics"]["eval/attack_success"] >= found["metrics"]["eval/forget_rate"]
    prompts = found["provenance"]["evaluation"]["metrics"]["paraphrases"]["prompts"]
    assert {"a photo of trousers", "a photo of a two"} <= set(prompts)


def test_generator_of_one_step_has_every_score_but_the_attacks(run):
    """The attack descends a denoising loss, which it has none of."""
    scores = summary(run(*SMALL, "method=sfd", "method.batch_size=4"))["metrics"]
    for key in ("forget_rate", "retain_accuracy", "forget_rate_paraphrases", "clip_score_retain"):
        assert {f"base/{key}", f"eval/{key}"} <= set(scores), key
    assert "base/attack_success" in scores
    assert "eval/attack_success" not in scores


@pytest.mark.slow
def test_run_on_what_the_base_draws(run, shared_cache):
    more = (
        *SMALL,
        "method=naive_deletion",
        "dataset.source=base",
        "dataset.num_images=12",
        "dataset.num_inference_steps=2",
    )
    first = run(*more, folder="a")
    drawn = list((shared_cache / "drawn").glob("*/images.safetensors"))
    bases = len(list((shared_cache / "bases").glob("*/model")))
    others = ("dataset.concept=a seven", "dataset.retain_concepts=[trousers,a one]", "model.network.trainable=lora")
    second = run(*more, *others, folder="b")
    assert len(list((shared_cache / "drawn").glob("*/images.safetensors"))) == len(drawn) + 1
    assert len(list((shared_cache / "bases").glob("*/model"))) == bases, (
        "one base for all concepts and all ways to train"
    )
    for folder in (first, second):
        assert summary(folder)["status"] == "finished"


def test_refuses(run):
    with pytest.raises(ConfigurationError, match=r"evaluation\.oracle=true retrains .*corpus"):
        run(*SMALL, "method=siss", "evaluation.oracle=true", folder="a")
    with pytest.raises(ConfigurationError, match="would have to draw the images that it learns from"):
        run("dataset=sd_concepts", "dataset.source=base", "method=siss", folder="b")
    with pytest.raises(ConfigurationError, match=r"the dataset's are 17 x 17"):
        run(*SMALL, "method=siss", "dataset.image_size=17", folder="c")


def test_same_seed_same_weights(run):
    from safetensors.torch import load_file

    def weights(folder):
        return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")

    a, b = (weights(run(*SMALL, *ROLLING, folder=folder)) for folder in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)

"""Every method that can runs on a Stable Diffusion of another's making: random weights, other sizes, v-prediction."""

import pytest
import torch
from conftest import ROOT, assert_same_bits
from diffusers import StableDiffusionPipeline
from hydra.errors import InstantiationException
from pipelines import foreign
from trainers import build_trainer, flat_state

from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.training.checkpoint import open_checkpoint

METHODS = (
    "siss", "siss_no_is", "adaptive_siss", "rl_lambda", "naive_deletion", "neg_grad", "erase_diff",
    "critic_guided", "ddpo",
)  # fmt: skip
DISTILLING = ("sfd", "sfd_two_stage", "hybrid")  # of a DDPM's pixels
SMALL = ("method.num_inference_steps=3", "method.num_rollouts=4", "method.critic_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return foreign(tmp_path_factory.mktemp("foreign"))


def configuration(composed, folder, method, *more):
    small = SMALL if method in ("critic_guided", "ddpo") else ()
    return composed(
        f"method={method}", "dataset=sd_concepts", "model=sd15", f"model.weights={folder}",
        "model.network.trainable=full", "dataset.concept=trousers", "dataset.retain_concepts=[a seven,a one]",
        "trainer.batch_size=3", *small, *more,
    )  # fmt: skip


def dataset_of(cfg) -> SDConcepts:
    return SDConcepts(**{name: value for name, value in cfg["dataset"].items() if name != "_target_"})


def test_every_method_is_looked_at():
    options = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert options == {*METHODS, *DISTILLING, "retrain"}, "retrain has the base's recipe, which sd15 has not"


@pytest.mark.parametrize(
    ("method", "trainable"),
    [*((method, "full") for method in METHODS), *((method, "lora") for method in ("siss", "critic_guided"))],
)
def test_method_moves_the_unet_alone_and_resumes(composed, folder, tmp_path, method, trainable):
    cfg = configuration(composed, folder, method, f"model.network.trainable={trainable}", "trainer.max_steps=3")
    data = dataset_of(cfg).load()

    def begun(place):
        trainer = build_trainer(cfg, data, tmp_path / place, resettable=False)  # a reset begins with the base
        trainer.method.networks[0].load(folder)
        return trainer

    whole, first, second = begun("a"), begun("b"), begun("b")
    model = whole.method.networks[0]
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    if method == "critic_guided":  # its critic's first rounds leave the model alone
        whole.method.critic_warmup = first.method.critic_warmup = second.method.critic_warmup = 0
    while not whole.done:
        metrics = whole.step()
        assert all(value.isfinite() for value in metrics.values())
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    assert moved
    assert all(name.startswith("unet.") for name in moved)
    assert all((".lora_" in name) == (trainable == "lora") for name in moved)
    first.step()
    first.step()
    first.save()
    second.resume(open_checkpoint(tmp_path / "b"))
    while not second.done:
        second.step()
    assert_same_bits(flat_state(second), flat_state(whole))
    whole.method.model.save(tmp_path / "model")
    StableDiffusionPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("method", DISTILLING)
def test_methods_that_distil_refuse(composed, folder, tmp_path, method):
    cfg = configuration(composed, folder, method)
    with pytest.raises(InstantiationException, match=r"ConfigurationError.*take model=ddpm_tiny"):
        build_trainer(cfg, dataset_of(cfg).load(), tmp_path)


def test_no_method_asks_for_the_models_kind():
    for file in (ROOT / "unlearn_runner" / "methods").glob("*.py"):
        assert "StableDiffusion" not in file.read_text(), file

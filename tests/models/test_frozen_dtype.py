"""Weights that stay as they are, kept in 16 bits."""

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import foreign_flux, foreign_sd3, foreign_xl

from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.flux import build_flux
from unlearn_runner.models.stable_diffusion import build_sdxl
from unlearn_runner.models.stable_diffusion_3 import build_sd3
from unlearn_runner.types import Batch, Passes, make_generator

PROMPTS = ("a zebra", "trousers")
SHAPE = (3, 16, 16)
KINDS = {"sdxl": (build_sdxl, foreign_xl), "sd3": (build_sd3, foreign_sd3), "flux": (build_flux, foreign_flux)}


@pytest.fixture(scope="module", params=KINDS)
def built(request, tmp_path_factory):
    build, make = KINDS[request.param]
    folder = make(tmp_path_factory.mktemp(request.param))

    def of(frozen_dtype, trainable="lora", **more):
        options = {"gradient_checkpointing": False, "frozen_dtype": frozen_dtype, **more}
        model = build(SHAPE, PROMPTS, 0, str(folder), trainable, **options)
        model.freeze_for_unlearning()
        model.load(folder)
        model.passes = Passes(torch.bfloat16, 1)
        return model

    return of


def stored(model):
    """Bytes of the weights, but for the autoencoder's."""
    return sum(
        weight.numel() * weight.element_size() for name, weight in model.named_parameters() if ".vae." not in name
    )


@pytest.mark.parametrize("trainable", ["lora", "cross_attention"])
def test_the_network_answers_the_same_and_what_is_trained_is_in_32_bits(built, trainable):
    whole, half = built("float32", trainable), built("bfloat16", trainable)
    x, t = torch.randn(2, *whole.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    cond = whole.embed(PROMPTS).detach()
    with torch.no_grad():
        assert torch.equal(half.predict(x, t, cond), whole.predict(x, t, cond))
    seen = half.embed(PROMPTS)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, cond, atol=0.1, rtol=0.05)
    assert all(weight.dtype == torch.float32 for weight in half.parameters() if weight.requires_grad)
    if trainable == "lora":
        assert stored(half) < 0.75 * stored(whole)


def test_a_step_moves_the_additions_alone_and_the_rest_is_saved(built, tmp_path):
    model = built("bfloat16")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    method = Denoising(Setting(model, make_generator(0, "noise")), lambda network: Update(network, torch.optim.AdamW))
    metrics = method.step(Batch(torch.rand(2, *SHAPE) * 2 - 1, None, torch.tensor([0, 1]), None, 0.0))
    assert metrics["loss/retain"].isfinite()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    images = model.sample(2, torch.tensor([0, 1]), torch.Generator().manual_seed(0), 2)
    assert images.isfinite().all()
    model.save(tmp_path)
    saved = DiffusionPipeline.from_pretrained(tmp_path)
    network = getattr(saved, "transformer", None) or saved.unet
    assert all(weight.isfinite().all() for weight in network.parameters())


def test_text_encoders_stay_where_they_are(built):
    """The network goes elsewhere alone, and is asked under the same conditions there."""
    model, staying = built("bfloat16"), built("bfloat16", texts_on_cpu=True)
    assert torch.equal(staying.embed(PROMPTS), model.embed(PROMPTS))
    cond = model.embeddings(torch.tensor([0, 1]))
    assert torch.equal(staying.embeddings(torch.tensor([0, 1])), cond)
    for of, device in ((staying, "cpu"), (model, "meta")):
        of.to("meta")
        assert {weight.device.type for weight in of.backbone.texts.parameters()} == {device}
        assert {weight.device.type for weight in of.backbone.network.parameters()} == {"meta"}
    assert staying.embed(PROMPTS).device.type == "meta", "the network's"

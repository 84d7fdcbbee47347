"""Stable Diffusion XL against diffusers' own pipeline, on a tiny one of its classes."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from pipelines import foreign, foreign_xl

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.model import denoising_loss
from unlearn_runner.models.one_step import OneStep, OneStepPipeline
from unlearn_runner.models.stable_diffusion import build_sdxl, build_stable_diffusion

PROMPTS = ("a zebra", "trousers", "a picture of trousers")
SHAPE = (3, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return foreign_xl(tmp_path_factory.mktemp("xl"))


def built(folder, loaded=True, **more):
    model = build_sdxl(SHAPE, PROMPTS, 0, str(folder), gradient_checkpointing=False, **more)
    if more.get("trainable", "lora") == "lora":
        model.freeze_for_unlearning()
    if loaded:
        model.load(folder)
    return model


def drawn_by_pipeline(folder, model, steps, lora=None, seed=5):
    """By its own pipeline, with the steps of ours: DDIM's, evenly spaced from the noisiest."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    config = dict(pipeline.scheduler.config) | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((len(PROMPTS), *model.sample_shape), generator=torch.Generator().manual_seed(seed))
    return pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=steps, guidance_scale=model.guidance_scale,
        height=SHAPE[1], width=SHAPE[2], output_type="pt",
    ).images  # fmt: skip


def drawn(model, steps, seed=5):
    images = model.sample(len(PROMPTS), torch.arange(len(PROMPTS)), torch.Generator().manual_seed(seed), steps)
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_draws_what_its_pipeline_draws(tmp_path, guidance_scale, zeros):
    folder = foreign_xl(tmp_path / "xl", prediction_type="v_prediction", force_zeros_for_empty_prompt=zeros)
    model = built(folder, guidance_scale=guidance_scale)
    theirs = drawn_by_pipeline(folder, model, 4)
    torch.testing.assert_close(drawn(model, 4), theirs, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] == zeros
    torch.testing.assert_close(drawn_by_pipeline(tmp_path / "saved", model, 4), theirs, atol=1e-5, rtol=1e-4)


def test_every_text_gets_its_own_pooled_row_and_size(folder):
    model = built(folder)
    packed = model.embed(PROMPTS)
    condition = model.backbone.conditions(packed)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    tokens, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    torch.testing.assert_close(condition.tokens, tokens)
    torch.testing.assert_close(condition.pooled, pooled)
    assert condition.sizes.tolist() == [[16, 24, 0, 0, 16, 24]] * 3
    torch.testing.assert_close(model.token_states(PROMPTS), tokens)
    assert torch.equal(model.embeddings(torch.tensor([2, 0])), packed[[2, 0]])
    x0, eps, t = torch.rand(3, *SHAPE), torch.randn(3, *model.sample_shape), torch.tensor([10, 500, 900])
    by_number = denoising_loss(model, x0, torch.arange(3), t, eps)
    assert torch.equal(denoising_loss(model, x0, packed, t, eps), by_number)
    swapped = packed.clone()
    swapped[:, -1] = packed[[1, 2, 0], -1]
    assert not torch.allclose(denoising_loss(model, x0, swapped, t, eps), by_number), "the pooled text counts"


def test_lora_is_loaded_by_the_pipeline(folder, tmp_path):
    model = built(folder, trainable="lora", lora_rank=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.3)
    ours = drawn(model, 3)
    model.save(tmp_path)
    assert (drawn_by_pipeline(folder, model, 3) - ours).abs().max() > 1e-2
    torch.testing.assert_close(drawn_by_pipeline(tmp_path, model, 3), ours, atol=1e-4, rtol=1e-4)
    theirs = drawn_by_pipeline(folder, model, 3, lora=tmp_path / "lora")
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_one_step_generator_of_it_comes_back(folder, tmp_path):
    model = OneStep(built(folder), 600)
    asked = torch.arange(3)
    ours = model.sample(3, asked, torch.Generator().manual_seed(1), 1)
    model.save(tmp_path)
    pipeline = OneStepPipeline.from_pretrained(tmp_path)
    assert pipeline(list(PROMPTS), torch.Generator().manual_seed(1)).shape == (3, 3, 16, 16), "its own size"
    again = OneStep(built(folder, loaded=False), 0)
    again.load(tmp_path)
    assert torch.equal(again.sample(3, asked, torch.Generator().manual_seed(1), 1), ours)


def test_another_kind_of_pipeline_is_named_with_what_to_take(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="it is a StableDiffusionXLPipeline; take model=sdxl"):
        build_stable_diffusion(SHAPE, PROMPTS, 0, str(folder))
    plain = foreign(tmp_path / "plain")
    StableDiffusionPipeline.from_pretrained(plain)
    with pytest.raises(ConfigurationError, match="it is a StableDiffusionPipeline; take model=sd15"):
        build_sdxl(SHAPE, PROMPTS, 0, str(plain))


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 40}, "sizes of 40 numbers, its second .* make 36"),
        ("unet", {"addition_embed_type": None}, r"asks for other things .* \(addition_embed_type: None\)"),
        ("unet", {"time_cond_proj_dim": 8}, r"\(time_cond_proj_dim: 8\)"),
        ("text_encoder_2", {"hidden_size": 32}, "conditions of 24 numbers, its text encoder makes them of 40"),
        ("text_encoder_2", {"vocab_size": 300}, r"tokenizer knows \d+ tokens, its text encoder 300"),
        ("vae", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, r"shifts its latents \(latents_mean\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, tmp_path, part, changes, says):
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=says):
        built(copied, loaded=False)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "unet"])
def test_a_missing_part_is_named(folder, tmp_path, part):
    copied = shutil.copytree(folder, tmp_path / "copied")
    shutil.rmtree(copied / part)
    with pytest.raises(ConfigurationError, match=f"{part} could not be read"):
        built(copied, loaded=False)

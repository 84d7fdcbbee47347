"""Stable Diffusion 3 against diffusers' own pipeline, on a tiny one of its classes."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pipelines import foreign_sd3, foreign_xl

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.model import denoising_loss
from unlearn_runner.models.one_step import OneStep, OneStepPipeline
from unlearn_runner.models.path import Straight, Velocity, shifted
from unlearn_runner.models.stable_diffusion import build_sdxl
from unlearn_runner.models.stable_diffusion_3 import build_sd3

PROMPTS = ("a zebra", "trousers", "a picture of trousers")
SHAPE = (3, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return foreign_sd3(tmp_path_factory.mktemp("sd3"))


def built(folder, loaded=True, image_shape=SHAPE, **more):
    model = build_sd3(image_shape, PROMPTS, 0, str(folder), gradient_checkpointing=False, **more)
    if more.get("trainable", "lora") == "lora":
        model.freeze_for_unlearning()
    if loaded:
        model.load(folder)
    return model


def drawn_by_pipeline(folder, model, steps, lora=None, seed=5, max_sequence_length=256, **more):
    """By its own pipeline, with the steps of ours: even before they are shifted, and whole timesteps of 1,000."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **more)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((len(PROMPTS), *model.sample_shape), generator=torch.Generator().manual_seed(seed))
    return pipeline(
        list(PROMPTS), latents=latents, sigmas=[1 - step / steps for step in range(steps)],
        num_inference_steps=steps, guidance_scale=model.guidance_scale, height=SHAPE[1], width=SHAPE[2],
        max_sequence_length=max_sequence_length, output_type="pt",
    ).images  # fmt: skip


def drawn(model, steps, seed=5):
    images = model.sample(len(PROMPTS), torch.arange(len(PROMPTS)), torch.Generator().manual_seed(seed), steps)
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize(("guidance_scale", "shift"), [(1.0, 1.0), (1.0, 3.0), (4.0, 3.0)])
def test_draws_what_its_pipeline_draws(tmp_path, guidance_scale, shift, t5):
    folder = foreign_sd3(tmp_path / "sd3", shift)
    model = built(folder, guidance_scale=guidance_scale, t5=t5)
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = drawn_by_pipeline(folder, model, 4, **without)
    torch.testing.assert_close(drawn(model, 4), theirs, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "text_encoder_3").is_dir() == t5
    torch.testing.assert_close(drawn_by_pipeline(tmp_path / "saved", model, 4, **without), theirs, atol=1e-5, rtol=1e-4)
    again = built(tmp_path / "saved", guidance_scale=guidance_scale)
    assert torch.equal(drawn(again, 4), drawn(model, 4))


SMALL = {
    "t5": False, "layers": 2, "heads": 2, "attention_head_dim": 8, "text_width": 16, "text_layers": 2, "num_tokens": 12,
    "words": ["zebra"], "vae": {"block_out_channels": [8, 8], "norm_num_groups": 4},
}  # fmt: skip


@pytest.mark.parametrize(("shift", "t5_tokens", "patch_size"), [(1.0, 0, 2), (3.0, 0, 1), (1.0, 6, 2)])
def test_a_fresh_one_draws_what_its_pipeline_draws(tmp_path, shift, t5_tokens, patch_size):
    sizes = {"shift": shift, "t5_tokens": t5_tokens, "patch_size": patch_size}
    model = build_sd3(SHAPE, PROMPTS, 0, "auto", "full", 4, False, guidance_scale=2.0, **sizes, **SMALL)
    with torch.no_grad():
        for weight in model.backbone.network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save(tmp_path)
    theirs = drawn_by_pipeline(tmp_path, model, 4, max_sequence_length=t5_tokens, text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(drawn(model, 4), theirs, atol=1e-5, rtol=1e-4)
    again = build_sd3(
        SHAPE, PROMPTS, 1, str(tmp_path), "full", 4, False, guidance_scale=2.0, t5=False, t5_tokens=t5_tokens
    )
    again.load(tmp_path)
    assert torch.equal(drawn(again, 4), drawn(model, 4))
    twin, other = (build_sd3(SHAPE, PROMPTS, seed, "auto", **sizes, **SMALL) for seed in (0, 1))
    same = build_sd3(SHAPE, PROMPTS, 0, "auto", **sizes, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(twin.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"t5": True}, "model.network.t5 must be false with model.weights=auto"),
        ({"attention_head_dim": 7}, "heads times model.network.attention_head_dim must divide by 4"),
        ({"text_width": 18}, "model.network.text_width must divide by 4, got 18"),
    ],
)
def test_sizes_that_cannot_be_are_refused(more, says):
    with pytest.raises(ConfigurationError, match=says):
        build_sd3(SHAPE, PROMPTS, 0, "auto", **(SMALL | more))


def test_what_is_read_of_texts_is_the_pipelines(folder):
    model = built(folder)
    condition = model.backbone.conditions(model.embed(PROMPTS))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    tokens, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(condition.tokens, tokens)
    torch.testing.assert_close(condition.pooled, pooled)
    assert [layer.in_features for layer in model.text_projections()] == [48]
    model.train()
    assert torch.equal(model.embed(PROMPTS), model.embed(PROMPTS)), "T5 has a dropout"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_path_is_the_shifted_schedulers(folder, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=shift)
    schedule, every = Straight(100, shift), torch.arange(100)
    scale, std = schedule.amplitudes(every)
    torch.testing.assert_close(std.flatten().flip(0), scheduler.sigmas[:100])
    torch.testing.assert_close(scale, 1 - std)
    torch.testing.assert_close(schedule.network_time(every).float().flip(0), scheduler.timesteps)
    levels = schedule.levels()
    torch.testing.assert_close(torch.tensor(levels.stds).float(), std.flatten()[:-1])
    flow = schedule.probability_flow(Velocity())
    for timestep in (0, 41, 98):
        assert flow.timestep(std[timestep].item()) == pytest.approx(timestep, abs=1e-3)
    assert flow.start == pytest.approx(std[0].item())
    assert shifted(shifted(0.3, shift), 1 / shift) == pytest.approx(0.3)


def test_its_target_is_the_velocity_of_shifted_latents(folder):
    model = built(folder)
    x0, t = torch.rand(2, *SHAPE) * 2 - 1, torch.tensor([10, 800])
    eps = torch.randn(2, *model.sample_shape)
    vae = model.codec.vae
    latents = (vae.encode(x0).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(model.encode(x0), latents.detach())
    torch.testing.assert_close(model.path.wanted(latents, eps, t), eps - latents)
    sigma = shifted((t + 1) / 1000, 3.0)[:, None, None, None]
    x_t, condition = (1 - sigma) * latents + sigma * eps, model.backbone.conditions(torch.tensor([0, 2]))
    prediction = model.backbone.network(x_t, condition.tokens, condition.pooled, 1000 * sigma.flatten()).sample
    wanted = (prediction - (eps - latents)).square().flatten(1).sum(1)
    torch.testing.assert_close(denoising_loss(model, x0, torch.tensor([0, 2]), t, eps), wanted, rtol=1e-4, atol=1e-4)


def test_lora_is_loaded_by_the_pipeline(folder, tmp_path):
    model = built(folder, trainable="lora", lora_rank=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.3)
    ours = drawn(model, 4)
    model.save(tmp_path)
    assert (drawn_by_pipeline(folder, model, 4) - ours).abs().max() > 1e-2
    torch.testing.assert_close(drawn_by_pipeline(tmp_path, model, 4), ours, atol=1e-4, rtol=1e-4)
    theirs = drawn_by_pipeline(folder, model, 4, lora=tmp_path / "lora")
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_what_unlearning_may_move(folder):
    moved = {}
    for trainable in ("full", "cross_attention", "cross_attention_kv", "not_cross_attention"):
        model = built(folder, loaded=False, trainable=trainable)
        model.freeze_for_unlearning()
        moved[trainable] = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(name.startswith("backbone.transformer.") for name in moved["full"])
    assert moved["cross_attention_kv"] < moved["cross_attention"] < moved["full"]
    assert moved["not_cross_attention"] == moved["full"] - moved["cross_attention"]
    assert any(".attn2." in name for name in moved["not_cross_attention"]), "SD3.5's second attention is the picture's"


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
    with pytest.raises(ConfigurationError, match="it is a StableDiffusion3Pipeline; take model=sd3"):
        build_sdxl(SHAPE, PROMPTS, 0, str(folder))
    with pytest.raises(ConfigurationError, match="it is a StableDiffusionXLPipeline; take model=sdxl"):
        built(foreign_xl(tmp_path / "xl"), loaded=False)
    with pytest.raises(ConfigurationError, match=r"places of latents of up to 24 x 24, .* make 32 x 12"):
        built(folder, loaded=False, image_shape=(3, 64, 24))
    with pytest.raises(ConfigurationError, match="sides divide by 4"):
        built(folder, loaded=False, image_shape=(3, 18, 24))


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("transformer", {"in_channels": 5}, "turns 5 channels into 4, the noisy samples have 4"),
        ("transformer", {"pooled_projection_dim": 20}, "pooled text of 20 numbers, its text encoders make it of 24"),
        ("transformer", {"joint_attention_dim": 32}, "conditions of 32 numbers, its text encoders make them of 24, 48"),
        ("text_encoder_3", {"d_model": 40}, "conditions of 48 numbers, its text encoders make them of 24, 40"),
        ("text_encoder_3", {"vocab_size": 20}, r"tokenizer knows \d+ tokens, its text encoder 20"),
        ("scheduler", {"use_beta_sigmas": True}, r"times are not known here \(use_beta_sigmas"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, tmp_path, part, changes, says):
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=says):
        built(copied, loaded=False)


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3", "transformer"])
def test_a_missing_part_is_named(folder, tmp_path, part):
    copied = shutil.copytree(folder, tmp_path / "copied")
    shutil.rmtree(copied / part)
    with pytest.raises(ConfigurationError, match=f"{part} could not be read"):
        built(copied, loaded=False)

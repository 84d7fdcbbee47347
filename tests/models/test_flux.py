"""FLUX against diffusers' own pipeline, on a tiny one of its classes."""

import json
import math
import shutil

import pytest
import torch
from diffusers import FluxPipeline
from pipelines import foreign_flux

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.flux import build_flux
from unlearn_runner.models.one_step import OneStep, OneStepPipeline

PROMPTS = ("a zebra", "trousers", "a picture of trousers")
SHAPE = (3, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return foreign_flux(tmp_path_factory.mktemp("flux"))


def built(folder, loaded=True, image_shape=SHAPE, **more):
    more = {"t5_tokens": 32} | more
    model = build_flux(image_shape, PROMPTS, 0, str(folder), gradient_checkpointing=False, **more)
    model.freeze_for_unlearning()
    if loaded:
        model.load(folder)
    return model


def drawn_by_pipeline(folder, model, steps, guidance=3.5, lora=None, seed=5):
    pipeline = FluxPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((len(PROMPTS), *model.sample_shape), generator=torch.Generator().manual_seed(seed))
    return pipeline(
        list(PROMPTS), latents=pipeline._pack_latents(noise, *noise.shape), num_inference_steps=steps,
        guidance_scale=guidance, height=SHAPE[1], width=SHAPE[2], max_sequence_length=32, output_type="pt",
    ).images  # fmt: skip


def drawn(model, steps, seed=5):
    images = model.sample(len(PROMPTS), torch.arange(len(PROMPTS)), torch.Generator().manual_seed(seed), steps)
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("told", "dynamic", "guidance"), [(True, True, 3.5), (True, False, 1.0), (False, False, 2.0)])
def test_draws_what_its_pipeline_draws(tmp_path, told, dynamic, guidance):
    folder = foreign_flux(tmp_path / "flux", told, dynamic)
    model = built(folder, embedded_guidance=guidance)
    theirs = drawn_by_pipeline(folder, model, 4, guidance)
    torch.testing.assert_close(drawn(model, 4), theirs, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "saved")
    torch.testing.assert_close(drawn_by_pipeline(tmp_path / "saved", model, 4, guidance), theirs, atol=1e-5, rtol=1e-4)
    other = drawn(built(folder, embedded_guidance=guidance + 2), 4)
    assert torch.equal(other, drawn(model, 4)) == (not told), "the scale counts where the network is told it"


def test_its_shift_is_that_of_the_pictures_size(folder):
    shift = built(folder, loaded=False).path.schedule.shift  # 8 x 12 latents: 24 places, between 16 and 64
    assert shift == pytest.approx(math.exp(0.5 + 8 / 48 * 0.65))
    larger = built(folder, loaded=False, image_shape=(3, 32, 32)).path.schedule.shift
    assert larger == pytest.approx(math.exp(1.15))


def test_what_is_read_of_texts_is_the_pipelines(folder):
    model = built(folder)
    condition = model.backbone.conditions(model.embed(PROMPTS))
    tokens, pooled, _ = FluxPipeline.from_pretrained(folder).encode_prompt(list(PROMPTS), None, max_sequence_length=32)
    torch.testing.assert_close(condition.tokens, tokens)
    torch.testing.assert_close(condition.pooled, pooled)
    assert condition.guidance.tolist() == [3.5] * 3


def test_lora_is_loaded_by_the_pipeline(folder, tmp_path):
    model = built(folder, lora_rank=2)
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


def test_a_one_step_generator_of_it_comes_back(folder, tmp_path):
    model = OneStep(built(folder), 600)
    ours = model.sample(3, torch.arange(3), torch.Generator().manual_seed(1), 1)
    model.save(tmp_path)
    assert isinstance(OneStepPipeline.from_pretrained(tmp_path).transformer, type(model.network.backbone.network))
    again = OneStep(built(folder, loaded=False), 0)
    again.load(tmp_path)
    torch.testing.assert_close(again.sample(3, torch.arange(3), torch.Generator().manual_seed(1), 1), ours)


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("transformer", {"in_channels": 20}, "turns 20 channels into 20, two by two places .* have 16"),
        ("transformer", {"joint_attention_dim": 32}, "a pooled text of 8 numbers and tokens of 32, .* of 8 and 24"),
        ("scheduler", {"invert_sigmas": True}, r"times are not known here \(invert_sigmas"),
        ("scheduler", {"shift_terminal": 0.1}, r"times are not known here \(shift_terminal"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, tmp_path, part, changes, says):
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=says):
        built(copied, loaded=False)

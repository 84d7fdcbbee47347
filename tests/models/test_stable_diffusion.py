"""The latent wrapper against diffusers' own pipeline."""

import shutil

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from pipelines import PROMPTS, foreign, tiny

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.latents import Autoencoder
from unlearn_runner.models.model import predict_eps
from unlearn_runner.models.texts import build_tokenizer


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory):
    return foreign(tmp_path_factory.mktemp("foreign"))


def drawn_by_pipeline(folder, prompts, model, steps, seed=5, lora=None):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((len(prompts), *model.sample_shape), generator=torch.Generator().manual_seed(seed))
    return pipeline(
        list(prompts), latents=latents, num_inference_steps=steps, guidance_scale=model.guidance_scale,
        height=model.image_shape[1], width=model.image_shape[2], output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_saved_pipeline_draws_the_same_images(tmp_path, prediction_type, guidance_scale):
    model = tiny(prediction_type=prediction_type, guidance_scale=guidance_scale)
    model.save(tmp_path)
    ours = model.sample(3, torch.arange(3), torch.Generator().manual_seed(5), 4)
    theirs = drawn_by_pipeline(tmp_path, PROMPTS, model, 4)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5, rtol=1e-5)


def test_foreign_pipeline_comes_back_as_it_was(foreign_folder, tmp_path):
    model = tiny(str(foreign_folder), image_shape=(3, 24, 32))
    model.load(foreign_folder)
    assert model.sample_shape == (3, 6, 8)
    assert model.embed(["x"]).shape == (1, 20, 24)
    assert model.codec.vae.config.scaling_factor == 0.7
    model.save(tmp_path)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(saved.scheduler) is PNDMScheduler
    theirs = StableDiffusionPipeline.from_pretrained(foreign_folder)
    for part in ("unet", "vae", "text_encoder"):
        for (name, a), b in zip(
            getattr(theirs, part).state_dict().items(), getattr(saved, part).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def test_noising_and_targets_are_the_schedulers():
    for prediction_type in ("epsilon", "v_prediction"):
        model = tiny(prediction_type=prediction_type)
        scheduler = DDPMScheduler.from_config(model.scheduler.config)
        x0 = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latents, timesteps = model.encode(x0), torch.tensor([0, 10, 500, 999])
        torch.testing.assert_close(
            latents, model.codec.vae.encode(x0).latent_dist.mean.detach() * model.codec.vae.config.scaling_factor
        )
        eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        noising = model.noising(x0, timesteps, None)
        m = noising.sample(eps)
        torch.testing.assert_close(m, scheduler.add_noise(latents, eps, timesteps))
        target = eps if prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, timesteps)
        torch.testing.assert_close(model.path.wanted(latents, eps, timesteps), target)
        prediction = torch.zeros_like(m)
        losses = model.loss(prediction, x0, m, eps, noising.std, timesteps)
        torch.testing.assert_close(losses, target.square().flatten(1).sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.path.noise_of(target, m, timesteps), eps, rtol=1e-4, atol=1e-4)


def test_latents_pass_for_the_images_they_stand_for():
    model = tiny()
    x0 = torch.rand(2, 3, 16, 16) * 2 - 1
    eps, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 2])
    for a, b in zip(
        predict_eps(model, x0, eps, timesteps, labels),
        predict_eps(model, model.encode(x0), eps, timesteps, labels),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_prompts_are_embedded_once_and_anew_with_other_weights():
    model = tiny()
    model.freeze_for_unlearning()
    asked = []
    texts = model.backbone.texts
    embed, texts.embed = texts.embed, lambda prompts: asked.append(tuple(prompts)) or embed(prompts)
    m, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 2])
    before = model.predict(m, t, labels)
    model.sample(2, labels, torch.Generator().manual_seed(0), 2)
    assert asked == [PROMPTS, ("",)]
    assert torch.equal(model.predict(m, t, embed([PROMPTS[0], PROMPTS[2]])), before)
    model.load_state_dict(tiny(seed=1).state_dict())
    model.predict(m, t, labels).sum().backward()  # embeddings made while sampling do not stand in training's way
    assert len(asked) == 4


def test_guidance_leads_away_from_the_empty_prompt():
    model = tiny(guidance_scale=4.0)
    m, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    conditional = model.predict(m, t, torch.tensor([0, 1]))
    empty = model.predict(m, t, model.embed(["", ""]))
    before = model.network_evaluations
    torch.testing.assert_close(model.guided(m, t, torch.tensor([0, 1])), empty + 4 * (conditional - empty))
    assert model.network_evaluations == before + 4
    model.guidance_scale = 1.0
    assert torch.equal(model.guided(m, t, torch.tensor([0, 1])), conditional)


def trained_names(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_what_unlearning_may_move():
    parts = ("full", "cross_attention", "cross_attention_kv", "not_cross_attention", "lora")
    full, cross, kv, others, lora = models = [tiny(trainable=trainable) for trainable in parts]
    for model in models:
        model.freeze_for_unlearning()
    assert trained_names(full) == {f"backbone.unet.{name}" for name, _ in tiny().backbone.unet.named_parameters()}
    assert trained_names(cross) == {name for name in trained_names(full) if ".attn2." in name} != set()
    read = {f"{id(part.weight)}" for part in kv.text_projections()}
    assert {f"{id(weight)}" for weight in kv.parameters() if weight.requires_grad} == read != set()
    assert trained_names(kv) < trained_names(cross)
    assert trained_names(others) == trained_names(full) - trained_names(cross)
    assert all(".lora_" in name for name in trained_names(lora))
    assert {name.split(".attentions")[0] for name in trained_names(lora)} > {"backbone.unet.mid_block"}


def test_lora_begins_as_the_base_and_is_saved_into_the_weights(tmp_path):
    base = tiny(seed=3)
    base.save(tmp_path / "base")
    model = tiny(str(tmp_path / "base"), trainable="lora", lora_rank=2)
    model.freeze_for_unlearning()
    model.load(tmp_path / "base")
    draw = (3, torch.arange(3))
    assert torch.equal(
        model.sample(*draw, torch.Generator().manual_seed(5), 3),
        base.sample(*draw, torch.Generator().manual_seed(5), 3),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.3)
    ours = (model.sample(*draw, torch.Generator().manual_seed(5), 3) / 2 + 0.5).clamp(0, 1)
    model.save(tmp_path / "moved")
    assert (drawn_by_pipeline(tmp_path / "base", PROMPTS, model, 3) - ours).abs().max() > 1e-2
    torch.testing.assert_close(drawn_by_pipeline(tmp_path / "moved", PROMPTS, model, 3), ours, atol=1e-4, rtol=1e-4)
    assert any(".lora_" in name for name in model.backbone.unet.state_dict()), (
        "saving leaves the trained network as it is"
    )
    lora = tmp_path / "moved" / "lora"
    theirs = drawn_by_pipeline(tmp_path / "base", PROMPTS, model, 3, lora=lora)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing)
        model.freeze_for_unlearning()
        assert model.backbone.unet.is_gradient_checkpointing == checkpointing
        loss = model.predict(torch.ones(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 2])).square().mean()
        gradients.append(torch.autograd.grad(loss, [w for w in model.parameters() if w.requires_grad]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_autoencoder_learns_and_measures_its_scale():
    model = tiny()
    autoencoder = Autoencoder(model.codec.vae, (3, 16, 16))
    coarse = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    eps = torch.randn(8, *autoencoder.sample_shape, generator=torch.Generator().manual_seed(1))
    t = torch.zeros(8, dtype=torch.int64)

    def loss():
        noising = autoencoder.noising(x0, t, None)
        m = noising.sample(eps)
        return autoencoder.loss(autoencoder.predict(m, t, None), x0, m, eps, noising.std, t).mean()

    first, optimizer = loss(), torch.optim.Adam(autoencoder.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < first / 2
    autoencoder.measure_scale(x0)
    latents = model.codec.vae.encode(x0).latent_dist.mean * model.codec.vae.config.scaling_factor
    torch.testing.assert_close(latents.std(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)


def test_autoencoders_loss_is_the_error_and_the_divergence():
    autoencoder = Autoencoder(tiny().codec.vae, (3, 16, 16), kl_weight=0.5)
    x0, t = torch.rand(1, 3, 16, 16) * 2 - 1, torch.zeros(4000, dtype=torch.int64)
    with torch.no_grad():
        center, std = autoencoder.noising(x0, t[:1], None)[1:]
    eps = torch.randn(4000, *autoencoder.sample_shape, generator=torch.Generator().manual_seed(2))
    images = x0.expand(4000, -1, -1, -1)
    losses = autoencoder.loss(images + 0.1, images, center + std * eps, eps, std.expand_as(eps), t)
    posterior = torch.distributions.Normal(center, std)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(losses.mean(), 3 * 256 * 0.01 + 0.5 * divergence, rtol=0.02, atol=0.1)


def test_tokenizer_spells_what_it_does_not_know():
    tokenizer = build_tokenizer(["seven", "eight"], 10)
    seven, foreign_word = tokenizer(["seven", "Zürich"]).input_ids
    assert len(seven) == 3
    assert len(foreign_word) > 6
    assert tokenizer.decode(foreign_word, skip_special_tokens=True) == "zürich"
    assert seven == tokenizer("SEVEN").input_ids


def test_refuses(foreign_folder, tmp_path):
    with pytest.raises(ConfigurationError, match="the dataset has none; take dataset=sd_concepts"):
        tiny(prompts=None)
    with pytest.raises(ConfigurationError, match="sides divide by 8"):
        tiny(str(foreign_folder), image_shape=(3, 36, 36))
    with pytest.raises(ConfigurationError, match="images of 3 channels, the dataset has 1"):
        tiny(str(foreign_folder), image_shape=(1, 32, 32))
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        tiny("./nowhere")
    with pytest.raises(ConfigurationError, match=r"model_index\.json could not be read"):
        tiny(str(tmp_path))
    for part in ("tokenizer", "unet", "scheduler"):
        broken = shutil.copytree(foreign_folder, tmp_path / part)
        shutil.rmtree(broken / part)
        with pytest.raises(ConfigurationError, match=f"{part} could not be read"):
            tiny(str(broken), image_shape=(3, 32, 32))
    lame = tiny(str(foreign_folder), image_shape=(3, 32, 32))
    broken = shutil.copytree(foreign_folder, tmp_path / "weights")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="unet could not be read"):
        lame.load(broken)

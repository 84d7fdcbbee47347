"""Schedules whose last x_t is pure noise (2305.08891), on which gamma is 0: v says what x0 and eps are without it."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pipelines import foreign, tiny

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.likelihood import bound_bits_per_dim, flow_bits_per_dim, strata
from unlearn_runner.methods.denoising import denoising_loss
from unlearn_runner.methods.esd import ESD
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.ddpm import ddpm
from unlearn_runner.models.model import predict_eps, predict_x0
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.models.path import Path, VariancePreserving
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
}  # fmt: skip


@pytest.fixture
def model(tiny_network):
    model = ddpm(tiny_network().backbone.unet, DDPMScheduler(**SCHEDULE))
    assert model.path.schedule.alphas_cumprod[-1] == 0
    return model


@pytest.fixture
def exact(model, monkeypatch):
    """Knows that every image is a grey of 0.3."""

    def predict(x_t, timesteps, cond):
        gamma, sigma = model.path.amplitudes(timesteps)
        eps = (x_t - gamma * 0.3) / sigma
        return gamma * eps - sigma * 0.3

    monkeypatch.setattr(model, "predict", predict)
    return model


def test_x0_and_eps_are_exact_at_every_timestep(exact):
    x0, eps = torch.full((4, 1, 8, 8), 0.3), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 998, 999])
    eps_pred, x_t = predict_eps(exact, x0, eps, timesteps, None)
    torch.testing.assert_close(eps_pred, eps, rtol=1e-4, atol=1e-4)
    assert torch.equal(x_t[3], eps[3])
    torch.testing.assert_close(predict_x0(exact, x_t, timesteps, None), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(OneStep(exact, 999).predict(eps, timesteps, None), x0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_goes_from_pure_noise_to_the_image(exact, eta):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    for step, (t, t_next) in enumerate(pairwise(exact.path.times(5))):
        mean, std = exact.path.step(x, exact.predict(x, t.expand(2), None), t.expand(2), t_next.expand(2), eta)
        if step == 0:
            gamma, sigma = (part[0].item() for part in exact.path.amplitudes(t_next[None]))
            torch.testing.assert_close(mean, gamma * 0.3 + (1 - eta) * sigma * x)
            assert std.flatten().tolist() == pytest.approx([eta * sigma] * 2)
        x = mean + std * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=1e-4, atol=1e-4)
    for sampler in ("ddim", "ddim_clipped", "ddpm"):
        drawn = exact.sample(2, None, torch.Generator().manual_seed(0), 10, sampler)
        torch.testing.assert_close(drawn, torch.full_like(drawn, 0.3), rtol=1e-3, atol=1e-3)


def test_ratios_end_where_there_is_no_signal(model):
    assert model.path.timestep_with_ratio(13.0, "x") < 999
    with pytest.raises(ConfigurationError, match=r"x must be a ratio .* 0\.0292 to 2\.25e\+03; got 1000000000"):
        model.path.timestep_with_ratio(1e9, "x")


def test_likelihoods_are_those_of_the_schedule_without_its_last_step(model, tiny_network):
    """What the last x_t tells is nothing, and the last but one is standard normal up to 1e-4 already."""
    shorter = ddpm(model.backbone.unet, DDPMScheduler(**SCHEDULE))
    shorter.path = Path(VariancePreserving(model.path.schedule.alphas_cumprod[:-1]), "v_prediction")
    generator = torch.Generator().manual_seed(0)
    x0, labels = torch.rand(2, 1, 8, 8, generator=generator) * 2 - 1, torch.tensor([1, 2])
    probe = torch.randint(2, x0.shape, generator=generator).float() * 2 - 1
    edges = strata(999, 4)
    timesteps = edges[:-1, None].expand(-1, 2).contiguous()
    eps = torch.randn((len(timesteps) + 1, *x0.shape), generator=generator)
    flows = [flow_bits_per_dim(part, x0, labels, probe, 0.5, 0.5) for part in (model, shorter)]
    bounds = [bound_bits_per_dim(part, x0, labels, timesteps, edges.diff().double(), eps) for part in (model, shorter)]
    for pair in (flows, bounds):
        assert pair[0].isfinite().all()
        assert torch.equal(*pair)


def latent_model(folder, **more):
    foreign(folder)
    DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    model = tiny(str(folder), image_shape=(3, 32, 32), **more)
    model.load(folder)
    assert model.path.schedule.alphas_cumprod[-1] == 0
    return model


def test_losses_of_latents(tmp_path):
    """At the last timestep v is -x0: of images as of their latents."""
    model = latent_model(tmp_path)
    x0 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, last = model.encode(x0), torch.tensor([999, 999])
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    prediction = model.predict(eps, last, torch.tensor([0, 1]))
    wanted = (prediction + latents).square().flatten(1).sum(1)
    for shown in (x0, latents):
        losses = denoising_loss(model, shown, torch.tensor([0, 1]), last, eps)
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)


def test_esd_starts_at_pure_noise_and_stays_finite(tmp_path):
    model = latent_model(tmp_path, guidance_scale=2.0)
    model.freeze_for_unlearning()
    labels = Labels(retain=(0,), forget=(1, 2), names=model.prompts, contents=(0, 1, 1))
    update = partial(Update, optimizer=partial(torch.optim.SGD, lr=1e-4))
    method = ESD(Setting(model, make_generator(0, "method"), labels), update, batch_size=2, num_inference_steps=2)
    for _ in range(4):  # both of the places where a drawing may be stopped
        assert method.step(Batch(None, None, None, None, 0.0))["loss/forget"].isfinite()
    assert all(weight.isfinite().all() for weight in model.parameters())

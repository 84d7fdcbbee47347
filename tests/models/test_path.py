"""Paths against their definition, diffusers' schedulers, and data that is Gaussian, for which all is known."""

import math
import re
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.path import Amplitudes, Gaussian, Path, Straight, VariancePreserving, path_of
from unlearn_runner.models.sampling import PathSampler

ZERO_SNR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
SCHEDULERS = {
    "epsilon": DDPMScheduler(),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "zero terminal SNR": DDPMScheduler(prediction_type="v_prediction", **ZERO_SNR),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
on_every_path = pytest.mark.parametrize("name", SCHEDULERS)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Exact:
    """The best prediction for images whose pixels are N(mean, spread^2)."""

    def __init__(self, path: Path, mean: float, spread: float):
        self.path, self.mean, self.spread = path, mean, spread

    def __call__(self, x_t, timesteps):
        scale, std = self.path.amplitudes(timesteps)
        share = (x_t - scale * self.mean) / (scale**2 * self.spread**2 + std**2)
        x0, eps = self.mean + scale * self.spread**2 * share, std * share
        return self.path.prediction.wanted(x0, eps, Amplitudes(scale, std))


@on_every_path
def test_an_answer_says_what_x_t_is_made_of_at_every_timestep(name):
    path = path_of(SCHEDULERS[name])
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    x0, eps = noise(2, 5, 1, 4, 4)
    scale, std = path.amplitudes(timesteps)
    x_t, prediction = scale * x0 + std * eps, path.wanted(x0, eps, timesteps)
    assert path.wants_the_image == (name != "epsilon")
    torch.testing.assert_close(path.noise_of(prediction, x_t, timesteps), eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path.x0_of(prediction, x_t, timesteps), x0, rtol=1e-3, atol=1e-3)


@on_every_path
def test_timestep_minus_one_is_the_image(name):
    path = path_of(SCHEDULERS[name])
    scale, std = path.amplitudes(torch.tensor([-1, 0]))
    assert (scale[0].item(), std[0].item()) == (1, 0)
    assert std[1] > 0
    assert path.times(5).tolist() == [999, 799, 599, 399, 199, -1]


@on_every_path
def test_noise_is_added_on_the_way(name):
    path = path_of(SCHEDULERS[name])
    earlier, later = torch.tensor([-1, 0, 300, 998]), torch.tensor([0, 700, 301, 999])
    ratio, added = path.transition(earlier, later)
    (scale_before, std_before), (scale, std) = path.amplitudes(earlier), path.amplitudes(later)
    torch.testing.assert_close(ratio * scale_before, scale)
    torch.testing.assert_close(ratio**2 * std_before**2 + added, std**2, rtol=1e-4, atol=1e-6)


@on_every_path
def test_levels_are_the_same_in_double_precision(name):
    path = path_of(SCHEDULERS[name])
    scales, stds, added = path.schedule.levels()
    count = 999 if name in ("flow", "zero terminal SNR") else 1000
    assert len(scales) == len(stds) == len(added) + 1 == count
    timesteps = torch.arange(count)
    for found, wanted in zip((scales, stds), path.amplitudes(timesteps), strict=True):
        torch.testing.assert_close(torch.from_numpy(found).float(), wanted.flatten(), rtol=1e-4, atol=1e-6)
    _, between = path.transition(timesteps[:-1], timesteps[1:])
    torch.testing.assert_close(torch.from_numpy(added).float(), between.flatten(), rtol=1e-2, atol=1e-6)


@on_every_path
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_from_what_an_image_made_has_the_marginal_of_that_image(name, eta, double):
    """With predictions that know x0: given x0, x_next is N(scale x0, std^2); and at eta 1 it is Bayes' posterior."""
    path = path_of(SCHEDULERS[name]).double()
    t, t_next = torch.tensor([999, 700, 400, 0]), torch.tensor([799, 50, 399, -1])
    x0, eps = noise(2, 4, 1, 3, 3)
    (scale, std), (scale_next, std_next) = path.amplitudes(t), path.amplitudes(t_next)
    x_t = scale * x0 + std * eps
    found = path.step(x_t, path.wanted(x0, eps, t), t, t_next, eta)
    left = (found.mean - scale_next * x0) / eps  # what of x_t's own noise is left
    torch.testing.assert_close(left**2 + found.std**2, (std_next**2).expand_as(left), rtol=1e-8, atol=1e-9)
    assert torch.equal(found.std == 0, (t_next < 0)[:, None, None, None] | (torch.tensor(eta) == 0))
    if eta == 1:
        ratio, added = path.transition(t_next, t)
        precision = 1 / std_next[:3] ** 2 + ratio[:3] ** 2 / added[:3]
        torch.testing.assert_close(found.std[:3] ** -2, precision, rtol=1e-6, atol=0)
        mean = (scale_next * x0)[:3] / std_next[:3] ** 2 + (ratio * x_t / added)[:3]
        torch.testing.assert_close(found.mean[:3], mean / precision, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.mean[3], x0[3], rtol=1e-8, atol=1e-9)


def test_a_gaussian_draws_and_weighs():
    mean, std = noise(3, 1, 2, 2), torch.tensor([0.5, 2.0, 0.0])[:, None, None, None]
    x = Gaussian(mean, std).sample(noise(3, 1, 2, 2, seed=1))
    torch.testing.assert_close(x[:2], (mean + std * noise(3, 1, 2, 2, seed=1))[:2])
    assert torch.equal(x[2], mean[2])
    found = Gaussian(mean, std).log_prob(x)
    density = torch.distributions.Normal(mean[:2], std[:2].expand(2, 1, 2, 2)).log_prob(x[:2])
    torch.testing.assert_close(found, torch.cat([density.flatten(1).sum(1), torch.zeros(1)]))


def test_a_flow_is_the_one_that_diffusers_saves():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)
    path, every = path_of(scheduler), torch.arange(100)
    assert (path.prediction_type, path.num_train_timesteps) == ("flow", 100)
    torch.testing.assert_close(path.amplitudes(every).std.flatten(), scheduler.sigmas.flip(0))
    torch.testing.assert_close(path.schedule.network_time(every).float(), scheduler.timesteps.flip(0))
    x0, eps = noise(2, 1, 1, 2, 2)
    scale, std = path.amplitudes(torch.tensor([41]))
    torch.testing.assert_close(scale * x0 + std * eps, scheduler.scale_noise(x0, torch.tensor([42.0]), eps))


def test_without_noise_a_flow_steps_as_euler_and_as_diffusers():
    path, scheduler = path_of(SCHEDULERS["flow"]), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    exact, x = Exact(path, 0.3, 0.5), noise(3, 1, 2, 2)
    theirs = x
    for told, (t, t_next) in zip(scheduler.timesteps, pairwise(path.times(4)), strict=True):
        assert path.schedule.network_time(t[None]) == told
        prediction = exact(x, t.expand(3))
        after = path.step(x, prediction, t.expand(3), t_next.expand(3), 0.0)
        torch.testing.assert_close(after.mean, x - (t - t_next) / 1000 * prediction)
        assert after.std.abs().max() == 0
        theirs = scheduler.step(exact(theirs, t.expand(3)), told, theirs).prev_sample
        x = after.mean
        torch.testing.assert_close(x, theirs)


def test_small_noisy_steps_are_those_of_flow_grpo(double):
    """x + [v + s^2/(2t) (x + (1-t) v)] dt backwards with noise s sqrt(dt), s = a sqrt(t / (1-t)) (2505.05470)."""
    path, eta = Path(Straight(100_000), "flow"), 0.7
    x, prediction = noise(2, 3, 1, 2, 2)
    t, t_next = torch.tensor([29_999, 49_999, 89_999]), torch.tensor([29_998, 49_998, 89_998])
    time, dt = ((t + 1) / 100_000)[:, None, None, None], 1e-5
    square = 2 * eta**2 * time / (1 - time)
    drift = prediction + square / (2 * time) * (x + (1 - time) * prediction)
    found = path.step(x, prediction, t, t_next, eta)
    torch.testing.assert_close((x - found.mean) / dt, drift, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.std**2 / dt, square, rtol=1e-3, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_flow_draws_what_it_has_learnt_exactly(sampler):
    """Gaussian images: each z goes to mean + spread z by the ODE, and to the same distribution by the SDE."""
    path = path_of(SCHEDULERS["flow"])
    exact, z = Exact(path, 0.3, 0.5), noise(5000, 1, 1, 2)
    draw, x = PathSampler(path, sampler, 500), z
    generator = torch.Generator().manual_seed(1)
    for t in draw.timesteps:
        x = draw.step(exact(x, t.expand(len(x))), t, x, generator=generator).prev_sample
    if sampler == "ddim":
        torch.testing.assert_close(x, 0.3 + 0.5 * z, rtol=0, atol=0.02)
    assert x.mean().item() == pytest.approx(0.3, abs=0.025)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_clipped_steps_stay_on_the_way_to_the_clipped_image():
    path, x = path_of(SCHEDULERS["flow"]), noise(2, 1, 2, 2)
    t, t_next, far = torch.tensor([599, 599]), torch.tensor([199, 199]), torch.full((2, 1, 2, 2), -9.0)
    found = path.step(x, far, t, t_next, 0.0, clips=True).mean
    torch.testing.assert_close(found, 0.8 + 0.2 * (x - 0.4) / 0.6)
    draw = PathSampler(path, "ddim_clipped", 3)
    last = draw.timesteps[-1]
    assert draw.step(far, last, x, generator=torch.Generator()).prev_sample.max() <= 1


def test_the_noise_of_every_schedule_is_found(name="flow"):
    path = path_of(SCHEDULERS[name])
    assert path.timestep_with_ratio(1.0, "x") == 499
    with pytest.raises(ConfigurationError, match=r"x must be a ratio .* 0\.001 to 999; got 2000"):
        path.timestep_with_ratio(2000.0, "x")
    magnitude = path.schedule.magnitude(torch.tensor([999, 499])).flatten().tolist()
    assert magnitude == pytest.approx([1, math.sqrt(0.5)])


def test_refuses():
    abar = DDPMScheduler().alphas_cumprod
    for schedule, prediction_type, known in (
        (VariancePreserving(abar), "sample", "epsilon, v_prediction"),
        (VariancePreserving(abar), "flow", "epsilon, v_prediction"),
        (Straight(1000), "epsilon", "flow"),
    ):
        sentence = f"prediction_type must be one of {known}, got '{prediction_type}'"
        with pytest.raises(ConfigurationError, match=re.escape(sentence)):
            Path(schedule, prediction_type)
    with pytest.raises(ConfigurationError, match=r"zero terminal SNR .*v_prediction, got 'epsilon'"):
        path_of(DDPMScheduler(**ZERO_SNR))

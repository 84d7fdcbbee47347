"""A flow of pixels: its base, its folder, and the methods that take it, against what is known of Gaussians."""

import json
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline
from toy import gaussian_flow

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.likelihood import NLL
from unlearn_runner.evaluation.membership import Membership
from unlearn_runner.evaluation.view import View
from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.distillation.networks import DistillationNetworks, NoiseRange, generator_loss
from unlearn_runner.methods.erase_diff import EraseDiff
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.neg_grad import NegGrad
from unlearn_runner.methods.policy.rollouts import move
from unlearn_runner.methods.siss.mixture import mix
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.models.ddpm import build_ddpm
from unlearn_runner.models.model import denoising_loss, predict_eps, predict_x0
from unlearn_runner.models.one_step import OneStep, OneStepPipeline
from unlearn_runner.rules.model_options import flow_of_pixels
from unlearn_runner.types import Batch, make_generator


@pytest.fixture
def flow(tiny_network):
    return partial(tiny_network, prediction_type="flow")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_network_learns_the_velocity_and_is_told_the_time(flow):
    network = flow()
    x0, eps, cond = *noise(2, 3, 1, 8, 8), torch.tensor([1, 2, 3])
    t = torch.tensor([0, 499, 999])
    share = torch.tensor([0.001, 0.5, 1.0])[:, None, None, None]
    prediction = network.backbone.unet((1 - share) * x0 + share * eps, t + 1, class_labels=cond).sample
    wanted = (prediction - (eps - x0)).square().flatten(1).sum(1)
    torch.testing.assert_close(denoising_loss(network, x0, cond, t, eps), wanted)


def test_no_loss_is_below_that_of_the_best_velocity():
    """Of images from N(mean, spread^2) it is the posterior's variance: spread^2 / ((1-t)^2 spread^2 + t^2) a pixel."""
    model, n = gaussian_flow([-0.3, 0.4], [0.5, 0.8], side=1), 200_000
    x0, eps = noise(2, n, 1, 1, 1)
    for label, (mean, spread) in enumerate([(-0.3, 0.5), (0.4, 0.8)]):
        for timestep in (49, 499, 999):
            t = (timestep + 1) / 1000
            cond, timesteps = torch.full((n,), label), torch.full((n,), timestep)
            with torch.no_grad():
                losses = denoising_loss(model, mean + spread * x0, cond, timesteps, eps)
            assert losses.mean().item() == pytest.approx(spread**2 / ((1 - t) ** 2 * spread**2 + t**2), rel=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_clipped", "ddpm"])
def test_it_draws_what_it_has_learnt(sampler):
    model = gaussian_flow([-0.2, 0.3], [0.1, 0.2], side=1)
    labels = torch.tensor([0, 1]).repeat(2000)
    drawn = model.sample(4000, labels, torch.Generator().manual_seed(0), 100, sampler, batch_size=4000).flatten()
    for label, (mean, spread) in enumerate([(-0.2, 0.1), (0.3, 0.2)]):
        assert drawn[labels == label].mean().item() == pytest.approx(mean, abs=0.02)
        assert drawn[labels == label].std().item() == pytest.approx(spread, abs=0.02)
    again = model.sample(4000, labels, torch.Generator().manual_seed(0), 100, sampler, batch_size=4000)
    assert torch.equal(again.flatten(), drawn)


def test_its_folder_loads_by_us_and_by_diffusers(flow, tmp_path):
    network = flow(seed=3, num_train_timesteps=100)
    network.save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    loaded = build_ddpm((1, 8, 8), tuple("0123456789"), 0, str(tmp_path), [8], [False])
    loaded.load(tmp_path)
    assert (loaded.path.prediction_type, loaded.num_train_timesteps) == ("flow", 100)
    draw = (2, torch.tensor([1, 2]))
    ours, theirs = (part.sample(*draw, torch.Generator().manual_seed(0), 4) for part in (network, loaded))
    assert torch.equal(ours, theirs)

    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            prediction = pipeline.unet(x, t, class_labels=draw[1]).sample
            x = pipeline.scheduler.step(prediction, t, x).prev_sample
    torch.testing.assert_close(x.clamp(-1, 1), ours, rtol=1e-4, atol=1e-4)


def test_mixtures_of_siss_hold_on_a_flow(double):
    """The weights are the ratios of the Gaussian densities, and each origin's noise leads to the sample."""
    model, n = gaussian_flow([0.0], [1.0]), 6
    x, a = 0.2 * noise(2, n, 1, 2, 2)
    timesteps = torch.tensor([99, 299, 499, 699, 899, 999])
    noisings = [model.noising(part, timesteps, None) for part in (x, a)]
    from_forget = torch.tensor([True, False] * 3)
    found = mix(Batch(x, a, None, None, 0.0), timesteps, *noisings, noise(n, 1, 2, 2, seed=1), from_forget, 0.3)
    t = ((timesteps + 1) / 1000)[:, None, None, None]
    densities = [
        torch.distributions.Normal((1 - t) * part, t.expand_as(part)).log_prob(found.m).flatten(1).sum(1).exp()
        for part in (x, a)
    ]
    mixture = 0.7 * densities[0] + 0.3 * densities[1]
    for origin, x0, density in zip((found.retain, found.forget), (x, a), densities, strict=True):
        torch.testing.assert_close(origin.weight, density / mixture)
        torch.testing.assert_close((1 - t) * x0 + t * origin.eps, found.m)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_methods_of_losses_take_steps(flow):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 4, 1, 8, 8, generator=g) * 2 - 1
    batch = Batch(*images, torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, 8, 8]), 0.1)
    update = partial(Update, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    for kind, more in ((SISS, {"rho": 0.5}), (Denoising, {}), (NegGrad, {}), (EraseDiff, {})):
        network = flow()
        before = torch.cat([weight.detach().flatten() for weight in network.parameters()])
        method = kind(Setting(network, make_generator(0, "m")), update, **more)
        for _ in range(2):
            metrics = method.step(batch)
        assert all(torch.as_tensor(value).isfinite().all() for value in metrics.values()), (kind, metrics)
        after = torch.cat([weight.detach().flatten() for weight in network.parameters()])
        assert after.isfinite().all()
        assert not torch.equal(before, after), kind


def test_a_generator_is_shown_noise_as_large_as_what_the_network_has_seen():
    """Of images with the standard deviation 1; and its x0 is that of the flow there."""
    model = gaussian_flow([0.4], [1.0], side=1)
    start = model.path.timestep_with_ratio(2.502, "x")
    generator = OneStep(model, start)
    z, label = noise(50_000, 1, 1, 1), torch.zeros(50_000, dtype=torch.int64)
    t = (start + 1) / 1000
    x_t = z * ((1 - t) ** 2 + t**2) ** 0.5
    torch.testing.assert_close(generator.predict(z, label, label), predict_x0(model, x_t, label + start, label))


def test_score_forgetting_is_the_same_on_a_flow(double):
    """Its identity (2404.04057): E[(f_phi - f_psi) . (f_psi - x_g)] is 0 where f_psi is E[x_g | x_t], on any path."""
    model, n = gaussian_flow([0.0, 0.5], [0.5, 0.7], side=1).double(), 400_000
    timesteps = torch.randint(100, 900, (n,), generator=torch.Generator().manual_seed(2))
    teacher, fake = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)
    x0, eps = 0.5 + 0.7 * noise(n, 1, 1, 1), noise(n, 1, 1, 1, seed=1)
    with torch.no_grad():
        eps_pred, x_t = predict_eps(model, x0, eps, timesteps, fake)
        f_phi, f_psi = (predict_x0(model, x_t, timesteps, label) for label in (teacher, fake))
    scale, std = model.path.amplitudes(timesteps)
    torch.testing.assert_close(scale * f_psi + std * eps_pred, x_t)
    products = ((f_phi - f_psi) * (f_psi - x0)).flatten()
    assert products.mean().item() == pytest.approx(0, abs=4 * products.std().item() / n**0.5)
    assert generator_loss(f_phi, f_psi, x0, 1.2).isfinite().all()


def test_distillation_and_its_folder(flow, tmp_path):
    network = flow()
    trio = DistillationNetworks(network, NoiseRange())
    trio.begin()
    labels, g = torch.tensor([1, 2, 7]), make_generator(0, "m")
    noised = trio.draw(labels, trio.draw_timesteps(3, g), g)
    for losses in (trio.fake_losses(labels, noised.timesteps, g), trio.generator_losses(noised, labels, labels, 1.2)):
        assert losses.isfinite().all()
    trio.generator.save(tmp_path)
    drawn = OneStepPipeline.from_pretrained(tmp_path)(labels, torch.Generator().manual_seed(0))
    ours = trio.generator.sample(3, labels, torch.Generator().manual_seed(0), 1, batch_size=3)
    torch.testing.assert_close(drawn, ours)


def test_policies_have_a_density_on_a_flow(flow):
    network, x, labels = flow(), noise(2, 1, 8, 8), torch.tensor([1, 2])
    t, t_next = torch.tensor([999, 499]), torch.tensor([499, -1])
    with torch.no_grad():
        found = move(network, x, t, t_next, labels, noise=noise(2, 1, 8, 8, seed=1), eta=1.0)
    density = torch.distributions.Normal(found.mean[0], found.std[0].expand(1, 8, 8)).log_prob(found.action[0]).sum()
    assert found.log_prob.tolist() == pytest.approx([density.item(), 0], rel=1e-5)
    assert torch.equal(found.action[1], found.mean[1])


def test_metrics_of_images(digits, flow):
    network = flow(image_shape=(1, 16, 16))
    for metric in (
        NLL(num_images=2, num_bound_images=3, num_timesteps=4, rtol=0.1, atol=0.1, batch_size=3),
        Membership(num_images=4, timesteps=[100, 900]),
    ):
        view = View(network, digits)
        assert not view.lacks(metric.needs)
        rows = metric.measure(view)
        assert all(part.isfinite().all() for part in rows.values())


def test_refuses(flow):
    with pytest.raises(ConfigurationError, match=r"flows are models of pixels so far, none of latents"):
        flow_of_pixels("auto", "flow")
    flow_of_pixels("some/folder", "flow")

"""SISS against its published formulas."""

import math

import pytest
import torch
from conftest import assert_same_bits

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.siss.gradient_norms import LastNorms, NormFix
from unlearn_runner.methods.siss.lambda_controllers import Constant
from unlearn_runner.methods.siss.mixture import importance_weights, mix, siss_loss
from unlearn_runner.methods.siss.passes import effective_sample_size, shared_passes
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.methods.siss.without_importance_sampling import SISSNoIS
from unlearn_runner.models.model import Noising, squared_error
from unlearn_runner.types import Batch, make_generator

F64 = torch.float64


def log_density(m, image, gamma, sigma):
    """log N(m; gamma image, sigma^2 I), summed over pixels, without its constant."""
    return -((m - gamma * image).square() / (2 * sigma**2)).flatten(1).sum(1)


def mixed(batch, gamma, sigma, eps, from_forget, lambd):
    """The mixture of a diffusion model: both images at one amplitude and one standard deviation of the noise."""
    noisings = (Noising(gamma, x0, sigma) for x0 in (batch.x0_retain, batch.x0_forget))
    return mix(batch, torch.zeros(len(eps), dtype=torch.int64), *noisings, eps, from_forget, lambd)


def pairs(b=64, scale=0.3, seed=0, labels=None):
    g = torch.Generator().manual_seed(seed)
    x0_retain, x0_forget, eps = (torch.randn(b, 1, 2, 2, generator=g, dtype=F64) * s for s in (scale, scale, 1.0))
    abar = torch.rand(b, 1, 1, 1, generator=g, dtype=F64) * 0.8 + 0.1
    from_forget = torch.rand(b, generator=g) < 0.5
    cond_retain, cond_forget = labels or (None, None)
    batch = Batch(x0_retain, x0_forget, cond_retain, cond_forget, 0.25)
    return batch, abar.sqrt(), (1 - abar).sqrt(), eps, from_forget


@pytest.mark.parametrize("lambd", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_weights_are_the_density_ratios(lambd):
    batch, gamma, sigma, eps, from_forget = pairs()
    from_forget = torch.full_like(from_forget, bool(lambd)) if lambd in (0.0, 1.0) else from_forget
    mixture = mixed(batch, gamma, sigma, eps, from_forget, lambd)
    q_x = log_density(mixture.m, batch.x0_retain, gamma, sigma).exp()
    q_a = log_density(mixture.m, batch.x0_forget, gamma, sigma).exp()
    q_lambda = (1 - lambd) * q_x + lambd * q_a
    torch.testing.assert_close(mixture.retain.weight, q_x / q_lambda, rtol=1e-10, atol=0)
    torch.testing.assert_close(mixture.forget.weight, q_a / q_lambda, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        (1 - lambd) * mixture.retain.weight + lambd * mixture.forget.weight,
        torch.ones(64, dtype=F64),
        rtol=1e-12,
        atol=0,
    )


def test_targets_lead_from_each_image_to_the_sample():
    batch, gamma, sigma, eps, from_forget = pairs()
    mixture = mixed(batch, gamma, sigma, eps, from_forget, 0.5)
    torch.testing.assert_close(gamma * batch.x0_retain + sigma * mixture.retain.eps, mixture.m)
    torch.testing.assert_close(gamma * batch.x0_forget + sigma * mixture.forget.eps, mixture.m)


def test_extreme_log_ratios_neither_overflow_nor_vanish():
    log_ratio = torch.tensor([-1e6, -800.0, 0.0, 800.0, 1e6], dtype=F64)
    w_retain, w_forget = importance_weights(log_ratio, 0.3)
    torch.testing.assert_close(w_retain, torch.tensor([1 / 0.7, 1 / 0.7, 1.0, 0.0, 0.0], dtype=F64))
    torch.testing.assert_close(w_forget, torch.tensor([0.0, 0.0, 1.0, 1 / 0.3, 1 / 0.3], dtype=F64))
    single = importance_weights(log_ratio.float(), 0.3)
    assert all(torch.isfinite(w).all() for w in single)


def test_loss_golden_value():
    """By hand: two samples of two pixels."""
    prediction = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64).view(2, 1, 1, 2)
    zeros, ones = torch.zeros_like(prediction), torch.ones_like(prediction)
    w_retain, w_forget = torch.tensor([2.0, 0.5], dtype=F64), torch.tensor([0.25, 1.5], dtype=F64)
    losses = (squared_error(prediction, target) for target in (zeros, ones))
    retain, forget = siss_loss(*losses, w_retain, w_forget)
    assert retain.item() == pytest.approx((2 * 1 + 0.5 * 4) / 2)
    assert forget.item() == pytest.approx((0.25 * 1 + 1.5 * 2) / 2)


@pytest.mark.parametrize("lambd", [0.2, 0.5, 0.8])
def test_mean_gradient_is_naive_deletions(lambd):
    """x from all of X, a from A, all N and K factors: E of the SISS gradient = naive deletion's.

    A network of two parameters, a m + b; four images of which one is to be deleted; three noise levels.
    """
    n, k, draws = 4, 1, 200_000
    g = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 1, 2, generator=g, dtype=F64)
    levels = torch.tensor([0.3, 0.5, 0.8], dtype=F64)
    weight = torch.tensor([0.7, -0.2], dtype=F64, requires_grad=True)

    def draw(low, high):
        index = torch.randint(low, high, (draws,), generator=g)
        return images[index]

    abar = levels[torch.randint(3, (draws,), generator=g)].view(-1, 1, 1, 1)
    gamma, sigma = abar.sqrt(), (1 - abar).sqrt()
    eps = torch.randn(draws, 1, 1, 2, generator=g, dtype=F64)
    batch = Batch(draw(0, n), draw(0, k), None, None, k / n)
    mixture = mixed(batch, gamma, sigma, eps, torch.rand(draws, generator=g) < lambd, lambd)

    def per_sample_gradient(m, target, w):
        residual = weight[0] * m + weight[1] - target
        return w[:, None] * 2 * torch.stack([(residual * m).flatten(1).sum(1), residual.flatten(1).sum(1)], 1)

    retain_factor, forget_factor = n / (n - k), k / (n - k)
    siss = retain_factor * per_sample_gradient(mixture.m, mixture.retain.eps, mixture.retain.weight)
    siss = (siss - forget_factor * per_sample_gradient(mixture.m, mixture.forget.eps, mixture.forget.weight)).detach()
    prediction = weight[0] * mixture.m + weight[1]
    errors = (squared_error(prediction, origin.eps) for origin in (mixture.retain, mixture.forget))
    losses = siss_loss(*errors, mixture.retain.weight, mixture.forget.weight)
    (gradient,) = torch.autograd.grad(retain_factor * losses[0] - forget_factor * losses[1], weight)
    torch.testing.assert_close(siss.mean(0), gradient)

    kept = draw(k, n)
    naive = per_sample_gradient(gamma * kept + sigma * eps, eps, torch.ones(draws, dtype=F64)).detach()
    error = (siss.var(0) / draws + naive.var(0) / draws).sqrt()
    assert ((siss.mean(0) - naive.mean(0)).abs() < 4 * error).all()
    assert (error < 0.03).all()  # the test would notice a missing factor


def test_differing_conditions_make_the_weights_one_hot():
    labels = (torch.arange(64) % 3, torch.ones(64, dtype=torch.int64))
    batch, gamma, sigma, eps, from_forget = pairs(labels=labels)
    mixture = mixed(batch, gamma, sigma, eps, from_forget, 0.2)
    differ = labels[0] != labels[1]
    expected_retain = torch.where(from_forget, 0.0, 1 / 0.8).double()
    expected_forget = torch.where(from_forget, 1 / 0.2, 0.0).double()
    torch.testing.assert_close(mixture.retain.weight[differ], expected_retain[differ])
    torch.testing.assert_close(mixture.forget.weight[differ], expected_forget[differ])
    same = mixed(Batch(*batch[:2], None, None, 0.0), gamma, sigma, eps, from_forget, 0.2)
    torch.testing.assert_close(mixture.retain.weight[~differ], same.retain.weight[~differ])
    assert torch.equal(mixture.cond, torch.where(from_forget, labels[1], labels[0]))


def method(network, cls=SISS, **settings):
    setting = Setting(network, make_generator(0, "m"))
    return cls(setting, lambda model: Update(model, lambda w: torch.optim.SGD(w, lr=1e-3)), **settings)


def unit_batch(b=32, one_label=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, b, 1, 8, 8, generator=g) * 2 - 1
    x[1] = x[0] + 0.05 * x[1] if one_label else x[1]  # close pairs share the weights
    labels = torch.ones(b, dtype=torch.int64)
    return Batch(x[0], x[1], labels if one_label else torch.arange(b) % 10, labels, 0.1)


@pytest.mark.parametrize("one_label", [False, True], ids=["mostly one-hot", "overlapping"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_split_batches_give_the_plain_gradients(tiny_network, one_label, prediction_type):
    passes, weights = [], []
    for split in (True, False):
        siss = method(tiny_network(prediction_type=prediction_type), split=split, rho=0.1)
        for step in range(3):
            siss.step(unit_batch(one_label=one_label, seed=step))
        passes.append(siss.model.network_evaluations)
        weights.append(torch.cat([w.flatten() for w in siss.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-6)
    assert passes[1] == 96
    assert 96 <= passes[0] <= 96 * 1.25


def test_rows_are_passed_the_cheapest_way():
    def way(only_retain, only_forget, both, **more):
        w_retain, w_forget = (
            torch.tensor(
                [value for n, value in zip((only_retain, only_forget, both), column, strict=True) for _ in range(n)]
            )
            for column in ((1.0, 0.0, 0.5), (0.0, 1.0, 0.5))
        )
        return [(int(rows.sum()), terms) for rows, terms in shared_passes(w_retain, w_forget, **more)]

    assert way(32, 32, 0) == [(32, (0,)), (32, (1,))]
    assert way(0, 0, 64) == [(64, (0, 1))]
    assert way(64, 0, 0) == [(64, (0,))]
    assert way(24, 24, 16) == [(24, (0,)), (24, (1,)), (16, (0, 1))], "72 + 72 + 80 units instead of 320 or 240"
    assert way(28, 32, 4) == [(40, (1,)), (32, (0,))], "eight more units are cheaper than a third call"
    assert way(28, 32, 4, call=0.0) == [(32, (1,)), (24, (0,)), (8, (0, 1))]
    assert way(1, 1, 62) == [(64, (0, 1))]
    assert way(20, 20, 24) == [(32, (0, 1)), (16, (0,)), (16, (1,))], "whole eighths, and the most rows first"
    assert way(4, 3, 2, call=0.0) == [(4, (0,)), (3, (1,)), (2, (0, 1))], "a small batch's by the row"


def test_norms_may_be_measured_now_and_then(tiny_network):
    """Between two measurements the update is the plain one with the last factor; at them it is the plain one."""
    batches = [unit_batch(one_label=True, seed=step) for step in range(4)]
    plain, stale = method(tiny_network(), tau=5.0), method(tiny_network(), tau=5.0, norm_every=2)
    exact = method(tiny_network(), tau=5.0)
    for network in (plain, stale):
        network.step(batches[0])
    assert_same_bits(dict(plain.model.state_dict()), dict(stale.model.state_dict()))
    factor = 5.0 / exact.step(batches[0])["grad_norm/forget"].item()
    fixed = method(tiny_network())  # no norm fix: its superfactor is the factor
    fixed.trained.load_state_dict(stale.model.state_dict())
    fixed.generator.set_state(stale.generator.get_state())
    fixed.superfactor = factor - 1
    found, wanted = stale.step(batches[1]), fixed.step(batches[1])
    for got, expected in zip(stale.model.parameters(), fixed.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert found["grad_norm/forget"] != wanted["grad_norm/forget"], "the last one, from the step before"
    for key in ("loss/retain", "loss/forget"):
        assert found[key].item() == pytest.approx(wanted[key].item(), rel=1e-5)
    before = stale.norms.last
    stale.step(batches[2])
    assert stale.norms.last[0] is not before[0]


def test_a_batch_without_forget_samples_leaves_the_last_factor(tiny_network):
    norms = LastNorms(3)
    norms.keep(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1e4))
    assert norms.last[2] == 0
    norms.keep(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.5))
    norms.keep(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1e4))
    assert norms.last[2] == 0.5
    with pytest.raises(ConfigurationError, match=r"add method\.gradient_variance=false"):
        method(tiny_network(), norm_every=2, gradient_variance=True)


@pytest.mark.parametrize("lambd", [0.0, 1.0])
def test_the_ends_of_lambda_draw_from_one_image_only(tiny_network, lambd):
    siss = method(tiny_network(), lambd=lambd)
    metrics = siss.step(unit_batch())
    assert all(torch.isfinite(value) for value in metrics.values())
    mine, other = ("retain", "forget") if lambd == 0 else ("forget", "retain")
    assert metrics[f"weights/ess_{mine}"].item() == pytest.approx(1.0)
    assert metrics[f"grad_norm/{mine}"] > 0
    assert metrics[f"grad_norm/{other}"] < metrics[f"grad_norm/{mine}"]


def test_population_all_applies_the_factors_once(tiny_network):
    """Same draws, same gradients: only the factors differ."""
    norms = {}
    for population in ("retain", "all"):
        metrics = method(tiny_network(), population=population, superfactor=0.5).step(unit_batch())
        norms[population] = (metrics["grad_norm/retain"].item(), metrics["grad_norm/forget"].item())
    share = 0.1
    assert norms["all"][0] == pytest.approx(norms["retain"][0] / (1 - share), rel=1e-5)
    assert norms["all"][1] == pytest.approx(norms["retain"][1] * share / (1 - share), rel=1e-5)


def test_norm_fix():
    norm_retain, norm_forget = torch.tensor(10.0), torch.tensor(4.0)
    assert NormFix(tau=2.0).scale(norm_retain, norm_forget).item() == pytest.approx(0.5)
    assert NormFix().scale(norm_retain, norm_forget).item() == 1.0
    fix = NormFix(rho=0.1, ema_decay=0.5)
    assert fix.scale(norm_retain, norm_forget).item() == pytest.approx(0.1 * 10 / 4)
    assert fix.scale(torch.tensor(20.0), norm_forget).item() == pytest.approx(0.1 * 15 / 4)
    assert torch.isfinite(fix.scale(norm_retain, torch.tensor(0.0)))
    assert torch.isnan(fix.scale(norm_retain, torch.tensor(float("nan")))), "a non-finite norm is not hidden"


def test_step_is_the_published_update(tiny_network):
    """g = g_x - (tau / ||g_a||) g_a, clipped, by plain SGD: against autograd on the whole batch."""
    network, reference = tiny_network(), tiny_network()
    batch = unit_batch()
    generator = make_generator(0, "m")
    timesteps = torch.randint(1000, (32,), generator=generator)
    eps = torch.randn(batch.x0_retain.shape, generator=generator)
    coin = torch.rand(32, generator=generator)
    mixture = mixed(batch, *reference.path.amplitudes(timesteps), eps, coin < 0.4, 0.4)
    weights = list(reference.parameters())
    prediction = reference.predict(mixture.m, timesteps, mixture.cond)
    errors = (squared_error(prediction, origin.eps) for origin in (mixture.retain, mixture.forget))
    losses = siss_loss(*errors, mixture.retain.weight, mixture.forget.weight)
    g_x, g_a = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses)
    norm_a = math.sqrt(sum(g.square().sum().item() for g in g_a))
    with torch.no_grad():
        for weight, x, a in zip(weights, g_x, g_a, strict=True):
            weight -= 1e-3 * (x - 5.0 / norm_a * a)

    method(network, lambd=0.4, tau=5.0).step(batch)
    for got, wanted in zip(network.parameters(), weights, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_no_is_sees_both_images_once(tiny_network):
    network = tiny_network()
    before = [weight.clone() for weight in network.parameters()]
    metrics = method(network, SISSNoIS, rho=0.1).step(unit_batch())
    assert network.network_evaluations == 64
    assert metrics["loss/forget"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(8)).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0, 0, 0, 0])).item() == pytest.approx(0.25)
    assert effective_sample_size(torch.zeros(4)).item() == 0.0


def test_refuses_two_norms(tiny_network):
    with pytest.raises(ConfigurationError, match=r"give method\.tau or method\.rho, not both"):
        method(tiny_network(), tau=1.0, rho=0.1)


def test_constant_controller_takes_the_ends():
    assert [Constant(value).next(torch.zeros(4)).lambd for value in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]

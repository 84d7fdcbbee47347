"""SISS on a VAE: z from a mixture of two posteriors whose standard deviations differ."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.siss.lambda_controllers import Inferred
from unlearn_runner.methods.siss.mixture import mix
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.methods.siss.without_importance_sampling import SISSNoIS
from unlearn_runner.models.model import Noising
from unlearn_runner.types import Batch, make_generator

F64 = torch.float64
ENDS = (0.0, 1.0)


class Posteriors(NamedTuple):
    """q(z|x) and q(z|a) of each pair, apart by about their standard deviations, which differ twofold or more."""

    retain: Noising
    forget: Noising
    eps: Tensor
    from_forget: Tensor


def posteriors(b=64, latent=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(2, b, latent, generator=g, dtype=F64) * 0.5
    stds = 0.3 * (torch.randn(2, b, latent, generator=g, dtype=F64) * 0.7).exp()
    eps = torch.randn(b, latent, generator=g, dtype=F64)
    return Posteriors(
        *(Noising(1.0, *part) for part in zip(means, stds, strict=True)), eps, torch.rand(b, generator=g) < 0.5
    )


def mixed(found, lambd, labels=(None, None)):
    b = len(found.eps)
    images = torch.zeros(2, b, 1, 2, 2, dtype=F64)
    return mix(
        Batch(*images, *labels, 0.25), torch.zeros(b, dtype=torch.int64), found.retain, found.forget, found.eps,
        found.from_forget, lambd,
    )  # fmt: skip


def densities(found, z, lambd):
    q_x, q_a = (Normal(part.center, part.std).log_prob(z).sum(1).exp() for part in (found.retain, found.forget))
    return q_x, q_a, (1 - lambd) * q_x + lambd * q_a


@pytest.mark.parametrize("lambd", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_weights_are_the_posteriors_density_ratios(lambd):
    found = posteriors()
    if lambd in ENDS:
        found = found._replace(from_forget=torch.full((64,), bool(lambd)))
    mixture = mixed(found, lambd)
    own = torch.where(found.from_forget[:, None], found.forget.sample(found.eps), found.retain.sample(found.eps))
    torch.testing.assert_close(mixture.m, own, rtol=1e-14, atol=0)
    q_x, q_a, q_lambda = densities(found, mixture.m, lambd)
    torch.testing.assert_close(mixture.retain.weight, q_x / q_lambda, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(mixture.forget.weight, q_a / q_lambda, rtol=1e-9, atol=1e-300)
    for origin, noising in ((mixture.retain, found.retain), (mixture.forget, found.forget)):
        torch.testing.assert_close(noising.sample(origin.eps), mixture.m, rtol=1e-9, atol=1e-12)
        assert torch.equal(origin.std, noising.std)


def test_differing_labels_make_the_weights_one_hot():
    found = posteriors()
    labels = (torch.arange(64) % 3, torch.ones(64, dtype=torch.int64))
    mixture = mixed(found, 0.2, labels)
    differ = labels[0] != labels[1]
    assert torch.equal(mixture.retain.weight[differ] == 0, found.from_forget[differ])
    q_x, _, q_lambda = densities(found, mixture.m, 0.2)
    torch.testing.assert_close(mixture.retain.weight[~differ], (q_x / q_lambda)[~differ], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("lambd", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("num_labels", [10, None], ids=["conditional", "unconditional"])
def test_mean_weighted_loss_is_the_negative_elbo(tiny_vae, lambd, num_labels):
    """E over q_lambda of w_x l_x = E over q(z|x) of l_x = -ELBO(x), and the same of a; the ELBO by torch.distributions.

    With weights 1, or weights of posteriors that are taken for equally wide, the test would fail.
    """
    network = tiny_vae((1, 4, 4), num_labels, block_out_channels=[4]).double()
    network.vae.encoder["head"].weight.data *= 6  # untrained, all posteriors are about N(0, 1)
    network.vae.log_sigma.data.fill_(-1.0)
    draws, g = 20_000, torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 1, 4, 4, generator=g, dtype=F64) * 2 - 1
    labels = None if num_labels is None else torch.ones(draws, dtype=torch.int64)
    timesteps = torch.zeros(draws, dtype=torch.int64)
    eps = torch.randn(draws, 3, generator=g, dtype=F64)
    with torch.no_grad():
        noisings = [network.noising(image, timesteps[:1], None if labels is None else labels[:1]) for image in images]
        noisings = [Noising(1.0, *(part.expand(draws, 3) for part in noising[1:])) for noising in noisings]
        volume = float((noisings[0].std / noisings[1].std)[0].log().sum())
        assert 0.3 < abs(volume) < 3
        x, a = (image.expand(draws, -1, -1, -1) for image in images)
        from_forget = torch.rand(draws, generator=g) < lambd
        mixture = mix(Batch(x, a, labels, labels, 0.5), timesteps, *noisings, eps, from_forget, lambd)
        prediction = network.predict(mixture.m, timesteps, labels)
        for image, noising, origin, share, log_ratio_of_widths in zip(
            (x, a), noisings, (mixture.retain, mixture.forget), (1 - lambd, lambd), (volume, -volume), strict=True
        ):
            losses = network.loss(prediction, image, mixture.m, origin.eps, origin.std, timesteps)
            weighted = origin.weight * losses

            q = Normal(noising.center, noising.std)
            z = q.mean + q.stddev * torch.randn(draws, 3, generator=g, dtype=F64)
            likelihood = Normal(network.vae.decode(z, labels), network.vae.log_sigma.exp())
            log_ratio = q.log_prob(z).sum(1) - Normal(0.0, 1.0).log_prob(z).sum(1)
            elbo = likelihood.log_prob(image).flatten(1).sum(1) - log_ratio

            error = math.sqrt(float(weighted.var() + elbo.var()) / draws)
            assert float(weighted.mean()) == pytest.approx(-float(elbo.mean()), abs=4 * error)
            as_wide = torch.sigmoid(torch.logit(origin.weight * share) + log_ratio_of_widths) / share
            for wrong in (losses, as_wide * losses):
                assert abs(float(wrong.mean() + elbo.mean())) > 6 * error


def method(network, cls=SISS, **settings):
    network.freeze_for_unlearning()
    setting = Setting(network, make_generator(0, "m"))
    return cls(setting, lambda model: Update(model, lambda w: torch.optim.SGD(w, lr=1e-3)), **settings)


def unit_batch(b=32, close=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, b, 1, 8, 8, generator=g) * 2 - 1
    labels = torch.ones(b, dtype=torch.int64)
    return Batch(x[0], x[1], labels if close else torch.arange(b) % 10, labels, 0.1)


@pytest.mark.parametrize("cls", [SISS, SISSNoIS])
def test_a_step_moves_the_decoder_and_leaves_the_posteriors(tiny_vae, cls):
    network = tiny_vae()
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    metrics = method(network, cls, rho=0.1).step(unit_batch())
    assert all(torch.isfinite(value) for value in metrics.values())
    for name, weight in network.named_parameters():
        is_decoder = name.startswith("vae.decoder.")
        assert is_decoder != torch.equal(weight, before[name]) or "label" in name, name
    assert not torch.equal(network.vae.decoder["label"].weight, before["vae.decoder.label.weight"])


@pytest.mark.parametrize("close", [False, True], ids=["mostly one-hot", "overlapping"])
def test_split_batches_give_the_plain_gradients(tiny_vae, close):
    """Untrained, all posteriors are about N(0, 1): with one label all pairs overlap."""
    weights = []
    for split in (True, False):
        siss = method(tiny_vae(), split=split, rho=0.1)
        for step in range(3):
            siss.step(unit_batch(close=close, seed=step))
        weights.append(torch.cat([w.detach().flatten() for w in siss.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-6)


def test_a_learnt_lambda_bears_negative_losses(tiny_vae):
    """Nats of a density: a VAE that explains its images well has losses below -1 a pixel."""
    network = tiny_vae(num_labels=None)
    network.vae.log_sigma.data.fill_(-3.0)
    network.vae.decoder["blocks"][-1].weight.data.zero_()
    network.vae.decoder["blocks"][-1].bias.data.zero_()
    siss = method(network, lambd=Inferred("variance", partial(torch.optim.Adam, lr=1e-2)), rho=0.1)
    images = unit_batch(close=True)
    batch = Batch(0.01 * images.x0_retain, 0.01 * images.x0_forget, None, None, 0.1)
    for _ in range(2):
        metrics = siss.step(batch)
    assert metrics["loss/retain"] < -1
    assert all(torch.isfinite(value) for value in metrics.values())

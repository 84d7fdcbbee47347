"""Likelihoods against Gaussians and linear VAEs, whose likelihood is known."""

import math

import pytest
import torch
from no_samples import NO_SAMPLES
from torch import nn

from unlearn_runner.evaluation.likelihood import (
    NLL,
    bound_bits_per_dim,
    evidence_bits_per_dim,
    flow_bits_per_dim,
    latent_costs,
    strata,
)
from unlearn_runner.evaluation.view import View
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, Noising
from unlearn_runner.models.path import Path, Straight, VariancePreserving


class GaussianModel(DiffusionModel):
    """The exact model of data from N(mean, covariance): its eps_pred is linear in x_t."""

    def __init__(self, mean, covariance, schedule="linear", prediction_type="epsilon"):
        super().__init__()
        from diffusers import DDPMScheduler

        self.weight = nn.Parameter(torch.ones(()))  # where the model is, is asked of its weights
        self.mean, self.covariance = mean.double(), covariance.double()
        self.abar = None if prediction_type == "flow" else DDPMScheduler(beta_schedule=schedule).alphas_cumprod
        self.path = Path(Straight(1000) if self.abar is None else VariancePreserving(self.abar), prediction_type)
        self.num_train_timesteps, self.network_evaluations = 1000, 0

    def amplitudes(self, timesteps):
        """Between timesteps as the solver has it."""
        if self.abar is None:
            std = (timesteps.double() + 1) / 1000
            return 1 - std, std
        log_ratio = ((1 - self.abar) / self.abar).double().log() / 2
        t = timesteps.double().clamp(max=998.999999)
        low = t.floor().long()
        r = log_ratio[low] + (t - low) * (log_ratio[low + 1] - log_ratio[low])
        return (1 / (1 + (2 * r).exp())).sqrt(), (1 / (1 + (-2 * r).exp())).sqrt()

    def predict(self, x_t, timesteps, cond):
        scale, std = (part[:, None] for part in self.amplitudes(timesteps))
        x = x_t.flatten(1).double()
        marginal = scale[:, :, None] ** 2 * self.covariance + std[:, :, None] ** 2 * torch.eye(x.shape[1])
        share = torch.linalg.solve(marginal, (x - scale * self.mean)[:, :, None])[:, :, 0]
        x0, eps = self.mean + scale * share @ self.covariance, std * share
        prediction = {"epsilon": eps, "v_prediction": scale * eps - std * x0, "flow": eps - x0}[
            self.path.prediction_type
        ]
        return (prediction.view_as(x_t) * self.weight).to(x_t.dtype)

    def noising(self, x0, timesteps, cond):
        scale, std = self.path.amplitudes(timesteps)
        return Noising(scale, x0, std)

    def guided(self, x_t, timesteps, cond):
        return self.predict(x_t, timesteps, cond)

    def picture(self, x0):
        return x0

    def sample(self, *_, **__):
        raise NotImplementedError

    save = load = fits = loss = freeze_for_unlearning = sample
    components = None


def gaussian(d, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = 0.3 * torch.randn(d, d, generator=g) + 0.3 * torch.eye(d)
    return 0.2 * torch.randn(d, generator=g), root @ root.T + 0.02 * torch.eye(d)


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        ("linear", "epsilon"), ("linear", "v_prediction"), ("squaredcos_cap_v2", "epsilon"),
        ("squaredcos_cap_v2", "v_prediction"), (None, "flow"),
    ],
)  # fmt: skip
def test_flow_gives_the_density_of_a_gaussian(schedule, prediction_type):
    mean, covariance = gaussian(16)
    model = GaussianModel(mean, covariance, schedule, prediction_type)
    g = torch.Generator().manual_seed(1)
    distribution = torch.distributions.MultivariateNormal(mean, covariance)
    x0 = (mean + torch.randn(4, 16, generator=g) @ torch.linalg.cholesky(covariance).T).view(4, 1, 4, 4)
    repeats = 64  # Hutchinson's estimate has a variance where the covariance is not diagonal
    many = x0.repeat_interleave(repeats, 0)
    probe = torch.randint(2, many.shape, generator=g).float() * 2 - 1
    found = flow_bits_per_dim(model, many, None, probe, 1e-5, 1e-5).view(4, repeats).mean(1)
    wanted = -distribution.log_prob(x0.flatten(1)) / (16 * math.log(2))
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_flow_is_exact_where_the_divergence_is(prediction_type):
    """Independent pixels: the probe's estimate has no variance, only the first timestep's noise is left."""
    mean, variance = torch.linspace(-0.5, 0.5, 16), torch.linspace(0.05, 0.5, 16)
    model = GaussianModel(mean, variance.diag(), prediction_type=prediction_type)
    x0 = torch.linspace(-0.9, 0.9, 32).view(2, 1, 4, 4)
    found = flow_bits_per_dim(model, x0, None, torch.ones_like(x0), 1e-5, 1e-5)
    scale, std = (part.item() for part in model.path.amplitudes(torch.tensor([0])))
    noised = torch.distributions.Normal(scale * mean, (scale**2 * variance + std**2).sqrt())
    log_density = noised.log_prob(scale * x0.flatten(1)).sum(1) + 16 * math.log(scale)
    wanted = -log_density / (16 * math.log(2))
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=2e-3)
    rough = flow_bits_per_dim(model, x0, None, torch.ones_like(x0), 1e-3, 1e-3)
    assert rough.tolist() == pytest.approx(wanted.tolist(), abs=2e-2), "at the tolerance of evaluation=full"


def level_bits(x0, mean, std):
    """Exact bits per dimension of 256-level pixels under independent Gaussians."""
    normal = torch.distributions.Normal(mean.double(), std.double())
    x0 = x0.flatten(1).double()
    mass = normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)
    return -(mass.log() / math.log(2)).mean(1)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_bound_lies_a_little_above_the_truth(schedule):
    """For widely spread data with the variance beta_t, which is the true one there."""
    model = GaussianModel(torch.zeros(16), 0.09 * torch.eye(16), schedule)
    g = torch.Generator().manual_seed(2)
    levels = (0.3 * torch.randn(64, 16, generator=g)).clamp(-0.95, 0.95).mul(127.5).add(127.5).round()
    x0 = (levels / 127.5 - 1).view(64, 1, 4, 4)
    steps = torch.arange(1, 1000)[:, None].expand(-1, 64)  # the whole sum
    eps = torch.randn((1000, *x0.shape), generator=g)
    bound = bound_bits_per_dim(model, x0, None, steps, torch.ones(999).double(), eps)
    gap = (bound - level_bits(x0, torch.zeros(16), torch.full((16,), 0.3))[:, None]).mean(0)
    assert 0 < gap[1] < 0.05
    assert gap[1] < gap[0] < 1


def test_bound_is_tight_for_a_single_point_with_the_posterior_variance():
    """Data of one point, which the model knows: then the reverse steps are the posterior's, and all is certain."""
    x0 = torch.full((8, 1, 4, 4), 1 / 255)
    model = GaussianModel(x0[0].flatten(), 1e-12 * torch.eye(16))
    g = torch.Generator().manual_seed(2)
    steps, eps = torch.arange(1, 1000)[:, None].expand(-1, 8), torch.randn((1000, *x0.shape), generator=g)
    bound = bound_bits_per_dim(model, x0, None, steps, torch.ones(999).double(), eps).mean(0)
    # what remains: L_T, and a decoder of standard deviation 0.0074 on levels that are 0.0078 wide
    width = (1.2e-4 * 1e-4 / 2.2e-4) ** 0.5
    decoder = -math.log2(torch.distributions.Normal(0.0, width).cdf(torch.tensor(1 / 255)).item() * 2 - 1)
    assert bound[0].item() == pytest.approx(decoder, abs=0.02)
    assert bound[1] > bound[0]


def test_strata_estimate_the_whole_sum():
    model = GaussianModel(torch.zeros(16), 0.09 * torch.eye(16))
    g = torch.Generator().manual_seed(3)
    x0 = ((0.3 * torch.randn(1, 1, 4, 4, generator=g)).clamp(-1, 1)).expand(4000, -1, -1, -1)
    edges = strata(1000, 20)
    assert edges[0] == 1
    assert edges[-1] == 1000
    assert (edges.diff() > 0).all()
    sizes = edges.diff()
    timesteps = edges[:-1, None] + (torch.rand(len(sizes), 4000, generator=g) * sizes[:, None]).long()
    eps = torch.randn((len(sizes) + 1, *x0.shape), generator=g)
    few = bound_bits_per_dim(model, x0, None, timesteps, sizes.double(), eps)[:, 0]
    every = torch.arange(1, 1000)[:, None].expand(-1, 400)
    eps = torch.randn((1000, 400, 1, 4, 4), generator=g)
    whole = bound_bits_per_dim(model, x0[:400], None, every, torch.ones(999).double(), eps)[:, 0]
    error = math.hypot(float(few.std()) / 4000**0.5, float(whole.std()) / 400**0.5)
    assert float(few.mean()) == pytest.approx(float(whole.mean()), abs=4 * error)
    assert error < 0.04


def test_first_step_and_far_tails_stay_finite():
    """L_0 of a pixel that the model is wrong about by hundreds of standard deviations."""
    model = GaussianModel(torch.full((16,), -0.9), 1e-6 * torch.eye(16))
    x0 = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    steps, eps = torch.ones(1, 2).long(), torch.zeros(2, 2, 1, 4, 4)
    bound = bound_bits_per_dim(model, x0, None, steps, torch.ones(1).double(), eps)
    assert torch.isfinite(bound).all()
    assert (bound[1] > bound[0]).all()


def test_scores_of_a_network_repeat(digits, tiny_network):
    network = tiny_network(image_shape=(1, 16, 16), prediction_type="v_prediction", dropout=0.5).train()
    metric = NLL(num_images=2, num_bound_images=3, num_timesteps=4, rtol=0.1, atol=0.1, batch_size=2)
    rows = metric.measure(View(network, digits))
    assert {name: tuple(values.shape) for name, values in rows.items()} == {
        "nll_forget": (2,), "nll_retain": (2,), "nll_bound_forget": (3, 2), "nll_bound_retain": (3, 2),
    }  # fmt: skip
    torch.manual_seed(99)
    assert metric.score(NO_SAMPLES, metric.measure(View(network, digits))) == metric.score(NO_SAMPLES, rows)
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())


class LinearVAE(GenerativeModel):
    """x = W z + b + sigma noise, with a Gaussian q(z|x) whose mean is linear in x: its evidence is known."""

    def __init__(self, d=16, latent=3, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(d, latent, generator=g).double() * 0.4)
        self.bias, self.sigma = torch.randn(d, generator=g).double() * 0.2, 0.3
        self.sample_shape, self.num_train_timesteps, self.network_evaluations = (latent,), 1, 0
        covariance = self.weight.detach() @ self.weight.detach().T + self.sigma**2 * torch.eye(d).double()
        self.evidence = torch.distributions.MultivariateNormal(self.bias, covariance)
        precision = torch.eye(latent).double() + self.weight.detach().T @ self.weight.detach() / self.sigma**2
        self.posterior_covariance = torch.linalg.inv(precision)
        self.std = self.posterior_covariance.diagonal().sqrt() * torch.tensor([0.8, 1.0, 1.2]).double()

    def noising(self, x0, timesteps, cond):
        exact = (x0.flatten(1).double() - self.bias) @ self.weight / self.sigma**2 @ self.posterior_covariance
        return Noising(1.0, exact + 0.05, self.std.expand_as(exact))

    def predict(self, m, timesteps, cond):
        return (m @ self.weight.T + self.bias).view(len(m), 1, 4, 4)

    def loss(self, prediction, x0, m, eps, std, timesteps):
        normal = torch.distributions.Normal
        prior = normal(0.0, 1.0)
        log_q = (prior.log_prob(eps) - std.log()).sum(1)
        return log_q - prior.log_prob(m).sum(1) - normal(prediction, self.sigma).log_prob(x0).flatten(1).sum(1)

    def sample(self, *_, **__):
        raise NotImplementedError

    save = load = fits = freeze_for_unlearning = sample


def test_evidence_of_a_linear_vae():
    """The importance-weighted bound falls to the exact density; minus the ELBO lies above it by KL(q || p(z|x))."""
    model = LinearVAE()
    g = torch.Generator().manual_seed(1)
    x0 = model.evidence.sample((5,)).view(5, 1, 4, 4)
    nats = 16 * math.log(2)
    truth = -model.evidence.log_prob(x0.flatten(1)) / nats
    eps = torch.randn(20, 5 * 1000, 3, generator=g, dtype=torch.float64)  # 20,000 latents an image
    costs = latent_costs(model, x0.repeat_interleave(1000, 0), None, eps)
    costs = costs.view(20, 5, 1000).transpose(1, 2).flatten(0, 1)
    weighted, elbo = evidence_bits_per_dim(costs, 16).unbind(1)
    assert weighted.tolist() == pytest.approx(truth.tolist(), abs=3e-3)

    q = torch.distributions.MultivariateNormal(torch.full((3,), 0.05).double(), model.std.square().diag())
    posterior = torch.distributions.MultivariateNormal(torch.zeros(3).double(), model.posterior_covariance)
    divergence = float(torch.distributions.kl_divergence(q, posterior)) / nats
    assert divergence > 0.02
    assert elbo.tolist() == pytest.approx((truth + divergence).tolist(), abs=3e-3)

    gaps = [float((evidence_bits_per_dim(part, 16)[:, 0] - truth).mean()) for part in costs[:2000].split(4)]
    assert 0 < sum(gaps) / len(gaps) < divergence, "with few latents it lies between the two"
    (single,) = evidence_bits_per_dim(costs[:1], 16).T[:1]
    torch.testing.assert_close(single, costs[0] / nats)


def test_evidence_stays_finite_where_weights_underflow():
    costs = torch.tensor([[4000.0, -900.0], [4001.0, -900.0]])
    found = evidence_bits_per_dim(costs, 1) * math.log(2)
    wanted = [[4000 - math.log1p(math.exp(-1)) + math.log(2), 4000.5], [-900.0, -900.0]]
    assert found.flatten().tolist() == pytest.approx([value for row in wanted for value in row])


def test_scores_of_a_vae_repeat(digits, tiny_vae):
    network = tiny_vae(image_shape=(1, 16, 16)).train()
    metric = NLL(num_bound_images=5, num_importance_samples=3, batch_size=2)
    rows = metric.measure(View(network, digits))
    assert {name: tuple(values.shape) for name, values in rows.items()} == dict.fromkeys(
        ("nll_forget", "nll_retain", "nll_bound_forget", "nll_bound_retain"), (5,)
    )
    scores = metric.score(NO_SAMPLES, rows)
    torch.manual_seed(99)
    assert metric.score(NO_SAMPLES, metric.measure(View(network, digits))) == scores
    assert scores["nll_bound_forget"] > scores["nll_forget"]
    assert network.network_evaluations == 2 * 2 * 5 * 3
    # an untrained decoder's mean is about 0, with sigma 1: every pixel's density is that of N(0, 1), one of 256 levels
    pixel = -torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 1.0])) / math.log(2) + math.log2(127.5)
    assert pixel[0] - 0.5 < scores["nll_forget"] < pixel[1] + 0.5

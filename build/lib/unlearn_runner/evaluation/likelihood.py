"""How likely the model finds an image, in bits per dimension.

A diffusion model: by the probability-flow ODE, and by the cheap bound. A VAE: by importance sampling, and by its
evidence lower bound.

# Notation (variable -> papers)
# scales, stds, added -> sqrt(abar_t), sqrt(1 - abar_t), beta_t of a variance-preserving diffusion
# -cost -> log w_k = log p(x, z_k) - log q(z_k|x)
"""

import math
from functools import partial
from typing import Annotated, Any, ClassVar, final

import numpy as np
import torch
from annotated_types import Gt, Le, Lt
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.evaluation.metrics import Metric, Rows, measure_images
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, evaluating, loss_at, predict_eps
from unlearn_runner.options import BatchSize, PositiveFloat, PositiveInt, Seed
from unlearn_runner.types import make_generator

LEVELS = 255  # a pixel is one of 0..255, in [-1, 1] one of 256 values 2/255 apart
LEVEL_BITS = math.log2(LEVELS / 2)  # from a density over [-1, 1] to the probability of a level


def flow_bits_per_dim(
    model: DiffusionModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    probe: Float[Tensor, "b c h w"],
    rtol: float,
    atol: float,
) -> Float[Tensor, "b"]:
    """-log2 p(x0) / D of the probability-flow ODE (Song et al. 2021, 2011.13456, equations 13 and 39), a density.

    The ODE is the path's, from the schedule's first timestep, where x = scale x0, to where x is taken for standard
    normal. The divergence is estimated with one Rademacher vector `probe` an image (Hutchinson), the same along the
    way. Solved by scipy's adaptive Runge-Kutta 4(5), all images with one step size. NaN where it fails.
    """
    from scipy.integrate import solve_ivp

    flow = model.path.probability_flow()
    b, d = x0.shape[0], x0[0].numel()

    def slope(u: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[: b * d]).to(x0).view_as(x0).requires_grad_()
        with torch.enable_grad():
            drift = flow.drift(model.predict(x, x.new_full((b,), flow.timestep(u)), cond), x, u)
            (product,) = torch.autograd.grad(drift.learned, x, probe)
        divergence = drift.gain * (product * probe).flatten(1).sum(1) + drift.known * d
        slopes = torch.cat([drift.velocity.flatten(), divergence]).double().cpu().numpy()
        if u == flow.start and not np.isfinite(slopes).all():
            raise FloatingPointError  # scipy would look for a first step for ever
        return slopes

    start = np.concatenate([(flow.scale * x0).double().cpu().numpy().ravel(), np.zeros(b)])
    nowhere = torch.full((b,), torch.nan, dtype=torch.float64)
    with evaluating(model):
        try:
            solution = solve_ivp(slope, (flow.start, flow.end), start, rtol=rtol, atol=atol, t_eval=[flow.end])
        except FloatingPointError:
            return nowhere
    if not solution.success:
        return nowhere
    end, divergence = solution.y[: b * d, -1].reshape(b, d), solution.y[b * d :, -1]
    log_prior = -0.5 * (end**2).sum(1) - 0.5 * d * math.log(2 * math.pi)
    log_density = log_prior + divergence + d * math.log(flow.scale)
    return torch.from_numpy(-log_density / (d * math.log(2)))


def bound_bits_per_dim(
    model: DiffusionModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    timesteps: Int64[Tensor, "s b"],
    weights: Float[Tensor, "s"],
    eps: Float[Tensor, "s+1 b c h w"],
) -> Float[Tensor, "b 2"]:
    """The variational bound L_T + sum_t L_t + L_0 (DDPM, 2006.11239, equation 5), in bits per dimension.

    For both of the paper's fixed variances of the reverse step (section 3.2): the posterior's, best where x0 is one
    point, and beta_t, that of the noise added in a step, best where it is spread widely. The sum over t >= 1 is
    estimated from `timesteps`, one a stratum, weighted by the strata's sizes: unbiased. L_0 is the exact probability of
    the pixels' 256 levels (section 3.3), with the posterior's variance at t = 1, or beta_0.
    """
    scales, stds, betas = (torch.from_numpy(part).to(x0.device) for part in model.path.schedule.levels())
    noise_variance, d = stds**2, x0[0].numel()
    alphas = (scales[1:] / scales[:-1]) ** 2  # of t = 1, 2, ...
    posterior = betas * noise_variance[:-1] / noise_variance[1:]
    variances = torch.stack([posterior, betas])

    prior = 0.5 * (noise_variance[-1] + (scales[-1] * x0) ** 2 - 1 - noise_variance[-1].log()).flatten(1).sum(1)
    nats = [prior, prior]
    with evaluating(model), torch.no_grad():
        for t, weight, noise in zip(timesteps, weights, eps[:-1], strict=True):
            error = (predict_eps(model, x0, noise, t, cond)[0] - noise).double().square().flatten(1).sum(1)
            # the posterior's mean less the model's: beta_t / (sqrt(alpha_t) std_t) (eps - eps_theta)
            distance = error * betas[t - 1] ** 2 / (alphas[t - 1] * noise_variance[t])
            for which, variance in enumerate(variances):
                ratio = posterior[t - 1] / variance[t - 1]
                divergence = 0.5 * (d * (ratio - 1 - ratio.log()) + distance / variance[t - 1])
                nats[which] = nats[which] + weight * divergence
        first = torch.zeros_like(timesteps[0])
        eps_pred, x_t = predict_eps(model, x0, eps[-1], first, cond)
        scale, std = model.path.amplitudes(first)
    mean = ((x_t - std * eps_pred) / scale).double()
    for which, variance in enumerate((posterior[0], noise_variance[0])):
        nats[which] = nats[which] - _log_probability_of_level(x0.double(), mean, variance.sqrt()).flatten(1).sum(1)
    return torch.stack(nats, 1).cpu() / (d * math.log(2))


def _log_probability_of_level(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of the Gaussian's mass on the interval of a pixel's level; the outermost levels reach to infinity."""
    below = torch.where(x0 < -1 + 1 / LEVELS, -math.inf, (x0 - 1 / LEVELS - mean) / std)
    above = torch.where(x0 > 1 - 1 / LEVELS, math.inf, (x0 + 1 / LEVELS - mean) / std)
    flip = below > 0  # in the right tail both masses round to 1: mirror it to the left
    below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_above = torch.special.log_ndtr(above)
    return log_above + torch.log1p(-(torch.special.log_ndtr(below) - log_above).exp())


def latent_costs(
    model: GenerativeModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    eps: Float[Tensor, "k b ..."],
) -> Float[Tensor, "k b"]:
    """log q(z|x0) - log p(z) - log p(x0|z), in nats, of each image at each z that `eps` makes: a VAE's loss."""
    timesteps, costs = torch.zeros(len(x0), dtype=torch.int64, device=x0.device), []
    with evaluating(model), torch.no_grad():
        noising = model.noising(x0, timesteps, cond)
        for noise in eps:
            costs.append(loss_at(model, noising, x0, cond, timesteps, noise))
    return torch.stack(costs)


def evidence_bits_per_dim(costs: Float[Tensor, "k b"], dimensions: int) -> Float[Tensor, "b 2"]:
    """A VAE's -log2 p(x0) / D, a density, by two bounds from above over the same k latents.

    First the importance-weighted one, -log of the mean of exp(-cost) (Burda et al. 2016, 1509.00519, equation 8), which
    falls to the truth as k grows; then minus the evidence lower bound, the mean cost, which never lies below it.
    """
    nats = costs.double()
    weighted = math.log(len(nats)) - torch.logsumexp(-nats, 0)
    return torch.stack([weighted, nats.mean(0)], 1) / (dimensions * math.log(2))


@final
class NLL(Metric):
    """Negative log-likelihood in bits per dimension: nll_forget of training images to forget, which should rise, and
    nll_retain of held-out images to keep, which should stay.

    `nll_*` is by the probability-flow ODE on `num_images` images, pixels made continuous by uniform noise of one
    level's width; `nll_bound_*` the variational bound on `num_bound_images`, with `num_timesteps` strata, the
    smaller of the two variances'. The same images and noise for every model. `rtol`, `atol`: the solver's tolerances.

    A VAE's are `evidence_bits_per_dim`'s two bounds, both on `num_bound_images` images with `num_importance_samples`
    latents each, pixels made continuous likewise.
    """

    version = 1
    needs = ("likelihood",)
    held_out: ClassVar = {"nll_retain": "retain_test"}

    def __init__(
        self,
        num_images: PositiveInt = 16,
        num_bound_images: PositiveInt = 64,
        num_timesteps: Annotated[int, Gt(0), Lt(1000)] = 20,
        num_importance_samples: Annotated[int, Gt(0), Le(100_000)] = 64,
        rtol: PositiveFloat = 1e-3,
        atol: PositiveFloat = 1e-3,
        batch_size: BatchSize = 64,
        seed: Seed = 0,
    ):
        self.num_images, self.num_bound_images, self.num_timesteps = num_images, num_bound_images, num_timesteps
        self.num_importance_samples = num_importance_samples
        self.rtol, self.atol, self.batch_size, self.seed = rtol, atol, batch_size, seed

    def measure(self, view: View) -> Rows:
        model, data = view.model, view.data
        device = next(model.parameters()).device
        rows = {}
        if model.is_diffusion:
            estimates = [("nll", self.num_images, self._flow), ("nll_bound", self.num_bound_images, self._bound)]
        else:
            estimates = [("evidence", self.num_bound_images, self._evidence)]
        for name, images in (("forget", data.forget), ("retain", data.retain_test)):
            generator = make_generator(self.seed, f"nll/{name}", device)
            for key, count, measure in estimates:
                table = measure_images(
                    partial(measure, model, generator),
                    images,
                    data.spec.label_names is not None,
                    count,
                    self.batch_size,
                    self.seed,
                    device,
                )
                if table is None:
                    continue
                if key == "evidence":
                    rows[f"nll_{name}"], rows[f"nll_bound_{name}"] = table.unbind(1)
                else:
                    rows[f"{key}_{name}"] = table
        return rows

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {name: float(values.mean(0).min()) for name, values in rows.items()}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        common = {"unit": "bits per dimension", "num_bound_images": self.num_bound_images}
        if model.is_diffusion:
            kind = {
                "num_images": self.num_images,
                "num_timesteps": self.num_timesteps,
                "solver": "scipy RK45 on the probability-flow ODE, one Rademacher probe",
                "rtol": self.rtol,
                "atol": self.atol,
            }
        else:
            kind = {
                "estimate": "importance-weighted bound, and minus the ELBO of the same latents",
                "num_importance_samples": self.num_importance_samples,
            }
        return {**common, **kind, "batch_size": self.batch_size, "seed": self.seed}

    def _flow(
        self,
        model: DiffusionModel,
        generator: torch.Generator,
        x0: Float[Tensor, "b c h w"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b"]:
        continuous = dequantised(x0, generator)
        probe = torch.randint(2, x0.shape, generator=generator, device=x0.device).float() * 2 - 1
        density = flow_bits_per_dim(model, continuous, cond, probe, self.rtol, self.atol)
        return density + LEVEL_BITS

    def _evidence(
        self,
        model: GenerativeModel,
        generator: torch.Generator,
        x0: Float[Tensor, "b c h w"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b 2"]:
        continuous = dequantised(x0, generator)
        shape = (self.num_importance_samples, len(x0), *model.sample_shape)
        eps = torch.randn(shape, generator=generator, device=x0.device)
        densities = evidence_bits_per_dim(latent_costs(model, continuous, cond, eps), x0[0].numel())
        return densities.cpu() + LEVEL_BITS

    def _bound(
        self,
        model: DiffusionModel,
        generator: torch.Generator,
        x0: Float[Tensor, "b c h w"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b 2"]:
        edges = strata(len(model.path.schedule.levels().scales), self.num_timesteps).to(x0.device)
        sizes = edges.diff()
        uniform = torch.rand((len(sizes), len(x0)), generator=generator, device=x0.device)
        timesteps = edges[:-1, None] + (uniform * sizes[:, None]).long()
        eps = torch.randn((len(sizes) + 1, *x0.shape), generator=generator, device=x0.device)
        return bound_bits_per_dim(model, x0, cond, timesteps, sizes.double(), eps)


def dequantised(x0: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Pixels made continuous by uniform noise as wide as one of the levels."""
    noise = torch.rand(x0.shape, generator=generator, device=x0.device)
    return x0 + (noise - 0.5) * (2 / LEVELS)


def strata(num_train_timesteps: int, count: int) -> Int64[Tensor, "edges"]:
    """Edges of at most `count` intervals of 1..T-1, growing with t: most of the bound lies at small t."""
    edges = 1 + (num_train_timesteps - 1) * torch.linspace(0, 1, count + 1, dtype=torch.float64) ** 2
    return edges.round().long().unique()

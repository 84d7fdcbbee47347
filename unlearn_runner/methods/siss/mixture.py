"""SISS as its paper has it, "Data Unlearning in Diffusion Models" (ICLR 2025, 2503.01034): loss, weights and mixture.

# Notation (variable -> paper)
# x0_retain, x0_forget -> x, a;  lambd -> lambda;  scale, std of a Noising -> gamma_t, sigma_t
# mixture.m -> m_t ~ q_lambda = (1 - lambda) q(.|x) + lambda q(.|a)
# w_retain, w_forget, or weight of an Origin -> q(m|x) / q_lambda(m), q(m|a) / q_lambda(m)
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.models.model import Noising
from unlearn_runner.types import Batch


def siss_loss(
    losses_retain: Float[Tensor, "b"],
    losses_forget: Float[Tensor, "b"],
    w_retain: Float[Tensor, "b"],
    w_forget: Float[Tensor, "b"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of SISS (2503.01034, equation 9): L_retain to descend, L_forget to ascend.

    losses_retain: l_x = ||eps_theta(m) - eps_x||^2, the prediction at the mixture's sample m compared with the noise
    that would have made m from x; losses_forget: l_a, with the noise that would have made it from a; where the network
    predicts v or a velocity, the same of that. Each is weighted and averaged over the batch. With all of X as retain
    stream, N/(N-K) L_retain - K/(N-K) L_forget is naive deletion's loss in expectation, for every lambda.
    """
    return (w_retain * losses_retain).mean(), (w_forget * losses_forget).mean()


def importance_weights(
    log_ratio: Float[Tensor, "b"], lambd: float | Float[Tensor, "#b"]
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """w_retain in [0, 1/(1-lambda)] and w_forget in [0, 1/lambda], from log_ratio = log q(m|a) - log q(m|x).

    Written with sigmoids, which neither overflow nor cancel however far the images are apart;
    (1 - lambda) w_retain + lambda w_forget = 1. At lambda 0 and 1, which a number may be but no tensor, the weight of
    the other image is the plain, unbounded ratio of the two densities.
    """
    if isinstance(lambd, Tensor):
        u = torch.logit(lambd) + log_ratio
    elif lambd == 0:
        return torch.ones_like(log_ratio), log_ratio.exp()
    elif lambd == 1:
        return (-log_ratio).exp(), torch.ones_like(log_ratio)
    else:
        u = math.log(lambd) - math.log1p(-lambd) + log_ratio
    return torch.sigmoid(-u) / (1 - lambd), torch.sigmoid(u) / lambd


class Origin(NamedTuple):
    """The mixture's samples seen as noised from one of the two images."""

    x0: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b ..."]  # that leads from x0 to the sample
    std: Float[Tensor, "b ..."]
    weight: Float[Tensor, "b"]  # q(m|x0) / q_lambda(m)


class Mixture(NamedTuple):
    """Samples m of q_lambda, and what they are to the two images they may have come from."""

    m: Float[Tensor, "b ..."]
    timesteps: Int64[Tensor, "b"]
    cond: Shaped[Tensor, "b ..."] | None  # of the image that the sample was drawn from
    retain: Origin
    forget: Origin

    def select(self, rows: Tensor | slice) -> "Mixture":
        retain, forget = (Origin(*(part[rows] for part in origin)) for origin in (self.retain, self.forget))
        cond = None if self.cond is None else self.cond[rows]
        return Mixture(self.m[rows], self.timesteps[rows], cond, retain, forget)


def mix(
    batch: Batch,
    timesteps: Int64[Tensor, "b"],
    noising_retain: Noising,
    noising_forget: Noising,
    eps: Float[Tensor, "b ..."],
    from_forget: Bool[Tensor, "b"],
    lambd: float | Float[Tensor, "#b"],
) -> Mixture:
    """Noise x or a, as `from_forget` says, by the pair's common eps, and weigh the outcome (equations 6 to 8).

    With conditions the mixture is over (m, c): where the two images' conditions differ, m's condition tells
    which of them it came from, and the weights are exactly one-hot.
    """
    pick = from_forget.view(-1, *[1] * (eps.ndim - 1))
    std_retain, std_forget = noising_retain.std, noising_forget.std
    std_own, std_other = torch.where(pick, std_forget, std_retain), torch.where(pick, std_retain, std_forget)
    # Standardised by the other image's q, m is ratio eps + shift or ratio eps - shift: no log-densities are subtracted
    # that are nearly equal. A diffusion model's ratio is 1.
    ratio = std_own / std_other
    shift = (noising_retain.scale / std_other) * (noising_retain.center - noising_forget.center)
    across = -(eps * shift * ratio).flatten(1).sum(1)
    half_distance = shift.square().flatten(1).sum(1) / 2 - ((1 - ratio.square()) * eps.square()).flatten(1).sum(1) / 2
    log_volume = (std_retain.log() - std_forget.log()).expand_as(eps).flatten(1).sum(1)
    log_ratio = across + torch.where(from_forget, half_distance, -half_distance) + log_volume
    w_retain, w_forget = importance_weights(log_ratio, lambd)
    cond = batch.cond_retain
    if cond is not None:
        differ = (batch.cond_retain != batch.cond_forget).reshape(len(cond), -1).any(1)
        chance = lambd if isinstance(lambd, Tensor) else eps.new_full((), lambd)
        tiny = torch.finfo(eps.dtype).tiny  # at the ends of lambda no sample is of the kind that would be divided by 0
        w_retain = torch.where(differ, (~from_forget) / (1 - chance).clamp(min=tiny), w_retain)
        w_forget = torch.where(differ, from_forget / chance.clamp(min=tiny), w_forget)
        chosen = from_forget.view(-1, *[1] * (cond.ndim - 1))
        cond = torch.where(chosen, batch.cond_forget, batch.cond_retain)
    drawn = Noising(
        noising_retain.scale, torch.where(pick, noising_forget.center, noising_retain.center), std_own
    ).sample(eps)
    return Mixture(
        m=drawn,
        timesteps=timesteps,
        cond=cond,
        retain=Origin(batch.x0_retain, torch.where(pick, ratio * eps - shift, eps), std_retain, w_retain),
        forget=Origin(batch.x0_forget, torch.where(pick, eps, ratio * eps + shift), std_forget, w_forget),
    )

"""SISS: subtracted importance sampled scores (Data Unlearning in Diffusion Models, ICLR 2025, 2503.01034).

# Notation (variable -> paper)
# x0_retain, x0_forget -> x, a;  lambd -> lambda;  gamma, sigma -> gamma_t, sigma_t
# mixture.x_t -> m_t ~ q_lambda = (1 - lambda) q(.|x) + lambda q(.|a)
# w_retain, w_forget -> q(m|x) / q_lambda(m), q(m|a) / q_lambda(m)
# forget_share -> K/N, forget images among all;  superfactor -> s
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.denoising import draw_noise, predict_noised, squared_error
from unlearn_runner.methods.lambdas import Constant, LambdaController, LastMetrics
from unlearn_runner.methods.method import Method, Update
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def siss_loss(
    prediction: Float[Tensor, "b c h w"],
    target_retain: Float[Tensor, "b c h w"],
    target_forget: Float[Tensor, "b c h w"],
    w_retain: Float[Tensor, "b"],
    w_forget: Float[Tensor, "b"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of SISS (2503.01034, equation 9): L_retain to descend, L_forget to ascend.

    The prediction at the mixture's sample m is compared with the noise that would have made m from x, and with
    the noise that would have made it from a. Each term is weighted, summed over pixels, averaged over the
    batch. With all of X as retain stream, N/(N-K) L_retain - K/(N-K) L_forget is naive deletion's loss in
    expectation, for every lambda.
    """
    retain = w_retain * squared_error(prediction, target_retain)
    forget = w_forget * squared_error(prediction, target_forget)
    return retain.mean(), forget.mean()


def importance_weights(log_ratio: Float[Tensor, "b"], lambd: float) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """w_retain in [0, 1/(1-lambda)] and w_forget in [0, 1/lambda], from log_ratio = log q(m|a) - log q(m|x).

    Written with sigmoids, which neither overflow nor cancel however far the images are apart;
    (1 - lambda) w_retain + lambda w_forget = 1. At lambda 0 and 1 the weight of the other image is the plain,
    unbounded ratio of the two densities.
    """
    if lambd == 0:
        return torch.ones_like(log_ratio), log_ratio.exp()
    if lambd == 1:
        return (-log_ratio).exp(), torch.ones_like(log_ratio)
    u = math.log(lambd) - math.log1p(-lambd) + log_ratio
    return torch.sigmoid(-u) / (1 - lambd), torch.sigmoid(u) / lambd


class Mixture(NamedTuple):
    """Samples of q_lambda with the weights of both images and the noise that leads from each to the sample."""

    x_t: Float[Tensor, "b c h w"]
    cond: Shaped[Tensor, "b ..."] | None  # of the image that the sample was drawn from
    eps_retain: Float[Tensor, "b c h w"]
    eps_forget: Float[Tensor, "b c h w"]
    w_retain: Float[Tensor, "b"]
    w_forget: Float[Tensor, "b"]


def mix(
    batch: Batch,
    gamma: Float[Tensor, "b 1 1 1"],
    sigma: Float[Tensor, "b 1 1 1"],
    eps: Float[Tensor, "b c h w"],
    from_forget: Bool[Tensor, "b"],
    lambd: float,
) -> Mixture:
    """Noise x or a, as `from_forget` says, by the pair's common eps, and weigh the outcome (equations 6 to 8).

    With conditions the mixture is over (m, c): where the two images' conditions differ, m's condition tells
    which of them it came from, and the weights are exactly one-hot.
    """
    pick = from_forget[:, None, None, None]
    difference = batch.x0_retain - batch.x0_forget
    shift = (gamma / sigma) * difference
    # log q(m|a) - log q(m|x), without the cancellation of subtracting two log-densities.
    across = -(eps * shift).flatten(1).sum(1)
    half_distance = shift.square().flatten(1).sum(1) / 2
    log_ratio = across + torch.where(from_forget, half_distance, -half_distance)
    w_retain, w_forget = importance_weights(log_ratio, lambd)
    cond = batch.cond_retain
    if cond is not None:
        differ = (batch.cond_retain != batch.cond_forget).reshape(len(cond), -1).any(1)
        w_retain = torch.where(differ, (~from_forget) / (1 - lambd if lambd < 1 else 1), w_retain)
        w_forget = torch.where(differ, from_forget / (lambd if lambd > 0 else 1), w_forget)
        chosen = from_forget.view(-1, *[1] * (cond.ndim - 1))
        cond = torch.where(chosen, batch.cond_forget, batch.cond_retain)
    return Mixture(
        x_t=gamma * torch.where(pick, batch.x0_forget, batch.x0_retain) + sigma * eps,
        cond=cond,
        eps_retain=torch.where(pick, eps - shift, eps),
        eps_forget=torch.where(pick, eps, eps + shift),
        w_retain=w_retain,
        w_forget=w_forget,
    )


@final
class NormFix:
    """Rescales every forget gradient to norm tau (2503.01034, section 4), up or down.

    tau is absolute, or `rho` times a moving average of the retain gradient's norm, which needs no tuning to the
    size of images and network. With neither, the factor is 1. The rescaling is at most `max_scale`, so that a
    batch that holds next to nothing to forget is not blown up. Stays on the device: no host sync.
    """

    def __init__(
        self,
        tau: float | None = None,
        rho: float | None = None,
        ema_decay: float = 0.9,
        max_scale: float = 1e4,
    ):
        if tau is not None and rho is not None:
            raise ConfigurationError(f"give method.tau or method.rho, not both; got tau={tau} and rho={rho}.")
        for name, value in (("tau", tau), ("rho", rho)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"method.{name} must be positive or null, got {value}.")
        self.tau, self.rho, self.ema_decay, self.max_scale = tau, rho, ema_decay, max_scale
        self.average: Tensor | None = None

    def scale(self, norm_retain: Float[Tensor, ""], norm_forget: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to multiply the forget gradient by."""
        if self.tau is None and self.rho is None:
            return torch.ones_like(norm_forget)
        if self.average is None:
            self.average = norm_retain
        self.average = self.ema_decay * self.average + (1 - self.ema_decay) * norm_retain
        wanted = self.rho * self.average if self.rho is not None else self.tau
        # 0 / 0 cannot arise from the cap: a forget gradient of zero norm is multiplied by max_scale and stays 0.
        return (wanted / norm_forget).clamp(max=self.max_scale)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


@final
class SISS(Method):
    """Descends L_retain and ascends L_forget on samples of a mixture of a retain and a forget image.

    Args:
        lambd: share of samples drawn from the forget image, in [0, 1], or a LambdaController.
        tau, rho: norm of the forget gradient, absolute or relative to the retain gradient's (see NormFix).
        population: "retain": x from X without A, no factors, as in the released code; "all": x from all of X
            with the factors N/(N-K) and K/(N-K), as in the theory. Either is right, both together would be wrong.
        superfactor: s, how much more than deletion's share the forget term weighs. Without effect under a norm fix.
        split: back-propagate each term only through the samples that carry weight in it.
    """

    def __init__(
        self,
        model: DiffusionModel,
        update: Callable[[DiffusionModel], Update],
        generator: torch.Generator,
        lambd: float | LambdaController = 0.5,
        tau: float | None = None,
        rho: float | None = None,
        population: str = "retain",
        superfactor: float = 0.0,
        split: bool = True,
    ):
        if population not in ("retain", "all"):
            raise ConfigurationError(f"method.population must be retain or all, got '{population}'.")
        if not superfactor > -1:
            raise ConfigurationError(f"method.superfactor must be greater than -1, got {superfactor}.")
        self.reads = Streams(retain=population, forget=True)
        self.networks = (model,)
        self.trained = model
        self.lambd = lambd if isinstance(lambd, LambdaController) else Constant(lambd)
        self.norm_fix = NormFix(tau, rho)
        self.superfactor = superfactor
        self.split = split
        self.update = update(model)
        self.generator = generator
        self.last = LastMetrics()

    @property
    def model(self) -> DiffusionModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. lambda, then t and eps common to each pair, and from which of the two images m is drawn
        lambd = self.lambd.next(self.last.metrics)
        timesteps, eps = draw_noise(self.trained, batch.x0_retain, self.generator)
        coin = torch.rand(timesteps.shape, generator=self.generator, device=timesteps.device)

        # 2. the sample m, its weights, and the network's targets seen from x and from a
        mixture = mix(batch, *self.trained.gamma_sigma(timesteps), eps, coin < lambd, lambd)

        # 3. the gradients of both terms
        loss_retain, loss_forget, grad_retain, grad_forget = self._gradients(batch, mixture, timesteps)
        share = batch.forget_share if self.reads.retain == "all" else 0.0
        grad_retain = grad_retain / (1 - share)
        grad_forget = grad_forget * (1 + self.superfactor) * (share / (1 - share) if share else 1.0)

        # 4. the forget gradient at its norm, and the update
        norm_retain, norm_forget = grad_retain.norm(), grad_forget.norm()
        self.update.apply(grad_retain - self.norm_fix.scale(norm_retain, norm_forget) * grad_forget)

        pixels = batch.x0_retain[0].numel()
        self.last.metrics = {
            "loss/retain": loss_retain / pixels,
            "loss/forget": loss_forget / pixels,
            "grad_norm/retain": norm_retain,
            "grad_norm/forget": norm_forget,
            "lambda/value": norm_retain.new_tensor(lambd),
            "weights/ess_retain": effective_sample_size(mixture.w_retain),
            "weights/ess_forget": effective_sample_size(mixture.w_forget),
        }
        return self.last.metrics

    def _gradients(self, batch: Batch, mixture: Mixture, timesteps: Int64[Tensor, "b"]) -> tuple[Tensor, ...]:
        """Both losses (detached) and their gradients.

        A pass forward and back costs 3 units a sample, a second pass back over the same graph 2. Samples whose
        weight in a term is below rounding are left out of that term's passes, which is exact to rounding; when
        both weights matter for most samples, one forward pass with two backward passes is cheaper.
        """
        target_retain = self.trained.target(batch.x0_retain, mixture.eps_retain, timesteps)
        target_forget = self.trained.target(batch.x0_forget, mixture.eps_forget, timesteps)
        negligible = torch.finfo(mixture.w_retain.dtype).eps / 16
        in_retain = mixture.w_retain > negligible
        in_forget = mixture.w_forget > negligible
        b = len(timesteps)

        if not self.split or int(in_retain.sum() + in_forget.sum()) * 3 > 5 * b:
            prediction = self.trained.predict(mixture.x_t, timesteps, mixture.cond)
            losses = siss_loss(prediction, target_retain, target_forget, mixture.w_retain, mixture.w_forget)
            return (
                *(loss.detach() for loss in losses),
                self.update.gradient(losses[0], retain_graph=True),
                self.update.gradient(losses[1]),
            )

        def term(rows: Bool[Tensor, "b"], which: int) -> tuple[Tensor, Tensor]:
            if not rows.any():
                return mixture.w_retain.new_zeros(()), self.update.zero_gradient()
            cond = None if mixture.cond is None else mixture.cond[rows]
            loss = siss_loss(
                self.trained.predict(mixture.x_t[rows], timesteps[rows], cond),
                target_retain[rows],
                target_forget[rows],
                mixture.w_retain[rows],
                mixture.w_forget[rows],
            )[which] * (rows.sum() / b)
            return loss.detach(), self.update.gradient(loss)

        loss_retain, grad_retain = term(in_retain, 0)
        loss_forget, grad_forget = term(in_forget, 1)
        return loss_retain, loss_forget, grad_retain, grad_forget

    def stateful(self) -> dict[str, Stateful]:
        return {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "lambd": self.lambd,
            "norm_fix": self.norm_fix,
            "last": self.last,
        }


@final
class SISSNoIS(Method):
    """SISS without importance sampling (2503.01034, section 4): x and a are noised and denoised on their own.

    The same two terms and norm fix; a forward pass for each image, each with its own t and eps.
    """

    def __init__(
        self,
        model: DiffusionModel,
        update: Callable[[DiffusionModel], Update],
        generator: torch.Generator,
        tau: float | None = None,
        rho: float | None = None,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (model,)
        self.trained = model
        self.norm_fix = NormFix(tau, rho)
        self.update = update(model)
        self.generator = generator

    @property
    def model(self) -> DiffusionModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. L_retain at the noisy x, L_forget at the noisy a
        (loss_retain, grad_retain), (loss_forget, grad_forget) = (
            (loss.detach() / x0[0].numel(), self.update.gradient(loss))
            for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget))
            for loss in [squared_error(*predict_noised(self.trained, x0, cond, self.generator)).mean()]
        )

        # 2. the forget gradient at its norm, and the update
        norm_retain, norm_forget = grad_retain.norm(), grad_forget.norm()
        self.update.apply(grad_retain - self.norm_fix.scale(norm_retain, norm_forget) * grad_forget)
        return {
            "loss/retain": loss_retain,
            "loss/forget": loss_forget,
            "grad_norm/retain": norm_retain,
            "grad_norm/forget": norm_forget,
        }

    def stateful(self) -> dict[str, Stateful]:
        return {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "norm_fix": self.norm_fix,
        }


def effective_sample_size(weights: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (b sum w^2): the share of the batch that the weights leave in effect, 0 if none has any."""
    tiny = torch.finfo(weights.dtype).tiny
    return weights.sum().square() / (len(weights) * weights.square().sum() + tiny)

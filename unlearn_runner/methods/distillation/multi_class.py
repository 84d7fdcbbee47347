"""SFD that turns the forgotten class into a mixture of all that are kept (2512.01054, section 5.2).

Each picture has its own shares.

The paper learns pi by its loss, whose sign is indefinite for alpha > 1; here pi is the exact minimiser of squared
distances d_r and the KL. The fake score is never pushed up its loss.

# Notation (variable -> paper)
# costs -> d_r;  prior, mixture -> pi0, pi;  beta -> beta, weight of KL(pi || pi0)
# posterior -> rho_r(x_t), the chance that x_t is of class r
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, final

import torch
from annotated_types import Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.methods.distillation.networks import (
    Distillation,
    LabelSampler,
    Noised,
    NoiseRange,
    generator_loss,
    split_losses,
)
from unlearn_runner.methods.distillation.overrides import class_costs
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.model import GenerativeModel, predict_x0
from unlearn_runner.options import BatchSize, PositiveFloat, PositiveInt
from unlearn_runner.rules import method_options
from unlearn_runner.types import Batch, Metrics


def mixture_costs(
    x0_teachers: Float[Tensor, "b r c h w"], x0_fake: Float[Tensor, "b c h w"], x0: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b r"]:
    """d_r = ||f_phi(c_r) - f_psi(c_f)||^2 / omega_r, omega_r the mean of |f_phi(c_r) - x_g|: how far each class is.

    Unlike the generator's loss it is never negative, so a mixture can be fitted to it.
    """
    omega = (x0_teachers - x0[:, None]).abs().flatten(2).mean(2).clamp(min=1e-5)
    return (x0_teachers - x0_fake[:, None]).square().flatten(2).sum(2) / omega


def optimal_mixture(costs: Float[Tensor, "b r"], prior: Float[Tensor, "r"], beta: float) -> Float[Tensor, "b r"]:
    """pi_r proportional to pi0_r exp(-d_r / beta): the minimiser of sum_r pi_r d_r + beta KL(pi || pi0)."""
    return torch.softmax(prior.log() - costs / beta, 1)


def mixture_guess(
    x0_teachers: Float[Tensor, "b r c h w"], class_costs: Float[Tensor, "b r"], mixture: Float[Tensor, "b r"]
) -> Float[Tensor, "b c h w"]:
    """E[x0|x_t] of the mixture sum_r pi_r p(.|c_r): sum_r rho_r f_phi(c_r), rho_r proportional to pi_r p(x_t|c_r).

    class_costs: -log p(x_t|c_r), up to a constant. Weighing the guesses by pi would aim at an average picture instead.
    """
    posterior = torch.softmax(mixture.log() - class_costs, 1)
    return (posterior[:, :, None, None, None] * x0_teachers).sum(1)


@final
class MultiClass(Distillation):
    """SFD with an adaptive mixture of all retained classes in place of an override rule.

    Args:
        beta: how much the mixture may depend on the picture; towards infinity it is the prior.
        prior: of the retained classes in the order of their labels; None: all alike.
        target: "drawn": one class is drawn from each sample's own mixture, which is unbiased and takes one pass with a
            gradient; "mixture_score": the score of the mixture itself, with the batch's mean mixture, for which every
            class takes one, and `num_draws` noises tell the classes apart (`overrides.class_costs`).
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        batch_size: BatchSize,
        forget_samples: Annotated[float, Gt(0), Le(1)],
        forget_weight: PositiveFloat,
        alpha: float,
        noise: NoiseRange,
        beta: PositiveFloat,
        prior: Sequence[PositiveFloat] | None = None,
        target: Literal["drawn", "mixture_score"] = "drawn",
        num_draws: PositiveInt = 1,
    ):
        super().__init__(setting, update, fake_update, noise)
        count = len(setting.labels.retain)
        method_options.shares_that_sum_to_one(prior)
        method_options.share_for_each_class(prior, count)
        if prior is None:
            prior = [1 / count] * count
        self.retained = setting.labels.retain
        self.labels = LabelSampler(setting.labels, batch_size, forget_samples, forget_weight)
        self.alpha, self.beta = alpha, beta
        self.prior, self.target, self.num_draws = torch.tensor(prior), target, num_draws

    def step(self, batch: Batch) -> Metrics:
        trio, g = self.trio, self.generator

        # 1. fake score
        metrics = trio.teach_fake(self.fake_update, self.labels.draw(g, trio.device), g)

        # 2. generator: towards its own class, or under the forget labels towards a mixture of the others
        drawn = self.labels.draw(g, trio.device)
        noised = trio.draw(drawn.labels, trio.draw_timesteps(len(drawn.labels), g), g)
        kept, forget = (noised.select(rows) for rows in (slice(drawn.kept), slice(drawn.kept, None)))
        own, forgotten = drawn.labels[: drawn.kept], drawn.labels[drawn.kept :]
        losses = trio.generator_losses(kept, own, own, self.alpha)
        if len(forgotten):
            mixture, shares = self._mixture(forget, forgotten)
            metrics |= shares
            losses = torch.cat([losses, self._forget_losses(forget, forgotten, mixture)])
        gradient = self.update.gradient((drawn.weights * losses).sum())
        self.update.apply(gradient)
        return {
            **metrics,
            **split_losses("loss/", losses, drawn.kept, trio.teacher.num_entries),
            "grad_norm/generator": gradient.norm(),
        }

    def _mixture(self, noised: Noised, forget: Int64[Tensor, "b"]) -> tuple[Float[Tensor, "b r"], Metrics]:
        """Each sample's mixture, and what to log of it: the mean KL from the prior in nats, the mean cost."""
        prior = self.prior.to(self.trio.device)
        with torch.no_grad():
            x0_fake = predict_x0(self.trio.fake, noised.x_t, noised.timesteps, forget)
            costs = mixture_costs(self._guesses(noised), x0_fake, noised.x0)
        mixture = optimal_mixture(costs, prior, self.beta)
        kl = (mixture * (mixture.clamp(min=torch.finfo(mixture.dtype).tiny) / prior).log()).sum(1)
        metrics = {"mixture/kl": kl.mean(), "mixture/cost": (mixture * costs).sum(1).mean()}
        shares = zip(self.retained, mixture.mean(0), strict=True)
        return mixture, metrics | {f"mixture/share/{label}": share for label, share in shares}

    def _forget_losses(
        self, noised: Noised, forget: Int64[Tensor, "b"], mixture: Float[Tensor, "b r"]
    ) -> Float[Tensor, "b"]:
        trio = self.trio
        if self.target == "drawn":
            chosen = torch.multinomial(mixture, 1, generator=self.generator).squeeze(1)
            return trio.generator_losses(noised, self._retained()[chosen], forget, self.alpha)
        costs = class_costs(
            trio.teacher, noised.x_t.detach(), noised.timesteps, self.retained, self.num_draws, self.generator
        )
        constant = mixture.mean(0, keepdim=True).expand_as(mixture)  # a mixture that does not depend on x_t has a score
        target = mixture_guess(self._guesses(noised), costs, constant)
        x0_fake = predict_x0(trio.fake, noised.x_t, noised.timesteps, forget)
        return generator_loss(target, x0_fake, noised.x0, self.alpha)

    def _guesses(self, noised: Noised) -> Float[Tensor, "b r c h w"]:
        """The teacher's guess of x0 for each retained class."""
        count, b = len(self.retained), len(noised.x_t)
        x_t, timesteps = (part.repeat_interleave(count, 0) for part in (noised.x_t, noised.timesteps))
        guesses = predict_x0(self.trio.teacher, x_t, timesteps, self._retained().repeat(b), guided=True)
        return guesses.unflatten(0, (b, count))

    def _retained(self) -> Int64[Tensor, "r"]:
        return torch.tensor(self.retained, device=self.trio.device)

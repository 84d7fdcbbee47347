"""SFD on a batch of mixed labels, lambda of which are to be forgotten (2512.01054, introduction: prose only).

# Notation (variable -> paper)
# lambd -> lambda;  forget_weight -> g_f, with g_r = 1
"""

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.gradients import gradients
from unlearn_runner.methods.distillation.networks import Distillation, NoiseRange
from unlearn_runner.methods.distillation.overrides import Override, OverrideBatch, drawn_labels
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.siss.lambda_controllers import Constant, Inferred, LambdaController
from unlearn_runner.methods.siss.lambda_objectives import StepObservation
from unlearn_runner.methods.siss.mixture import importance_weights, siss_loss
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, PositiveFloat, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, Metrics, Stateful


@final
class MixedLabels(Distillation):
    """SFD on one batch in which each sample has a forget label with chance lambda; importance weights keep the losses.

    A retain sample weighs 1 / (1 - lambda), a forget sample g_f / lambda, in both parts of the step: for every lambda
    the mean is SFD's, and lambda decides where the samples tell most.
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        override: Callable[[Labels], Override],
        batch_size: BatchSize,
        forget_weight: PositiveFloat,
        alpha: float,
        noise: NoiseRange,
        lambd: UnitInterval | LambdaController,
    ):
        super().__init__(setting, update, fake_update, noise)
        self.labels = setting.labels
        self.override = override(setting.labels)
        self.batch_size, self.forget_weight, self.alpha = batch_size, forget_weight, alpha
        self.lambd = controller(lambd)

    def step(self, batch: Batch) -> Metrics:
        trio, g, b = self.trio, self.generator, self.batch_size

        # 1. lambda, and labels by it
        timesteps = trio.draw_timesteps(b, g)
        level = timesteps / trio.teacher.num_train_timesteps
        lambd = self.lambd.next(level).lambd
        from_forget = torch.rand(b, generator=g, device=trio.device) < lambd
        retain, forget = (drawn_labels(part, b, g, trio.device) for part in (self.labels.retain, self.labels.forget))
        labels = torch.where(from_forget, forget, retain)
        # labels tell for certain which of the two a sample is: the ratio of densities is infinite or zero
        w_retain, w_forget = importance_weights(torch.where(from_forget, math.inf, -math.inf), lambd)

        # 2. fake score
        fake_losses = trio.fake_losses(labels, timesteps, g)
        weights = w_retain + self.forget_weight * w_forget
        fake_gradient = self.fake_update.gradient((weights * fake_losses).mean())
        self.fake_update.apply(fake_gradient)

        # 3. generator: the slopes over its images first, then both terms' gradients over its weights
        noised = trio.draw(labels, timesteps, g)
        targets = labels.clone()
        if from_forget.any():
            asked = OverrideBatch(noised.x0[from_forget].detach(), labels[from_forget], trio.teacher, g)
            targets[from_forget] = self.override(asked)
        losses = trio.generator_losses(noised, targets, labels, self.alpha)
        terms = siss_loss(losses, losses, w_retain, w_forget)
        (slopes,) = gradients(terms[0] + terms[1], [noised.x0], retain_graph=True)
        slopes_retain, slopes_forget = (
            torch.where(rows[:, None, None, None], slopes, 0.0) for rows in (~from_forget, from_forget)
        )
        grad_retain = self.update.gradient_from(noised.x0, slopes_retain, retain_graph=True)
        grad_forget = self.update.gradient_from(noised.x0, slopes_forget)
        self.update.apply(grad_retain + self.forget_weight * grad_forget)

        # 4. lambda's controller learns from what was seen
        pixels = trio.teacher.num_entries
        norms = grad_retain.norm(), grad_forget.norm()
        weighted = [(w * losses).detach() / pixels for w in (w_retain, w_forget)]
        seen = seen_of(
            level, (w_retain, w_forget), weighted, (slopes_retain * b, slopes_forget * b), norms, self.forget_weight
        )
        return {
            "loss/fake": (weights * fake_losses).detach().mean() / pixels,
            "loss/retain": weighted[0].mean(),
            "loss/forget": weighted[1].mean(),
            "grad_norm/fake": fake_gradient.norm(),
            "grad_norm/retain": norms[0],
            "grad_norm/forget": norms[1],
            "lambda/value": torch.as_tensor(lambd, device=trio.device).mean(),
            **self.lambd.learn(seen),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**super().stateful(), "lambd": self.lambd}


def controller(lambd: float | LambdaController) -> LambdaController:
    """Raises ConfigurationError for objectives made for a forget term that is ascended: here both are descended."""
    if isinstance(lambd, Inferred):
        method_options.objective_without_ascent(lambd.objective)
        method_options.lambda_without_images(lambd.per)
    return lambd if isinstance(lambd, LambdaController) else Constant(lambd)


def seen_of(
    level: Float[Tensor, "b"],
    weights: tuple[Float[Tensor, "b"], Float[Tensor, "b"]],
    losses: Sequence[Float[Tensor, "b"]],
    slopes: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
    norms: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    c_forget: float,
) -> StepObservation:
    """A step as lambda's controllers see it, from pairs of retain and forget. One-hot samples have no inner product."""
    return StepObservation(
        level,
        *weights,
        *losses,
        *(part.square().flatten(1).sum(1) for part in slopes),
        inner_product=(slopes[0] * slopes[1]).flatten(1).sum(1),
        norm_retain=norms[0],
        norm_forget=norms[1],
        c_retain=torch.ones_like(norms[0]),
        c_forget=torch.full_like(norms[1], c_forget),
    )

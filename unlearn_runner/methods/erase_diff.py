"""EraseDiff (2401.05779): erase while descending on what is kept. Two forms, which `method.variant` tells apart.

"siss": the form in which the SISS authors ran it as a baseline (`erasediff` in the released code of 2503.01034). On
forget images the target is uniform noise, and a step goes along g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f, the
closed form of BOME (2209.08709); nothing is minimised in between. There a retain and a forget image share t and eps,
here each has its own.

"released": EraseDiff's own released code for classes (github.com/JingWu321/EraseDiff, ddpm/runners/diffusion.py). Taken
from it: the target, which is the network's own prediction at the same x_t under another class, one drawn for the whole
batch, without gradient; the multiplier max(eta - cos(g_r, g_f), 0); losses that are means over pixels; `inner_steps`
updates of the erasing objective alone, by the same optimizer, before every `outer_steps` steps, after which the weights
are put back. The code subtracts the loss that these reach from the erasing objective, which changes no gradient: all
that is left of them is in Adam's moments. Not taken: pairs t, T - 1 - t; labels dropped in a tenth of the samples;
passes over the whole forget set (here: as many updates on the step's forget images, with fresh noise). Its commands
leave the multiplier at a constant, which `multiplier` gives.

# Notation (variable -> paper)
# grad_retain, grad_forget -> gradients of L_r(theta) and of f(theta), the erasing objective;  eta -> eta
# inner_steps -> K, of which theta^K comes
"""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.methods.denoising import draw_noise, drawn_loss
from unlearn_runner.methods.distillation.overrides import drawn_labels
from unlearn_runner.methods.method import Counter, Method, Setting, Update
from unlearn_runner.methods.salun import relabelled_loss
from unlearn_runner.models.model import GenerativeModel, predict_eps, squared_error
from unlearn_runner.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def erase_diff_loss(prediction_forget: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """f(theta): on forget images the network shall predict `target` instead of what it learnt there.

    "siss": its noise is compared with uniform noise from [0, 1). ("released": `salun.relabelled_loss`.) Squared error
    summed over pixels, averaged over the batch. In [0, inf).
    """
    return squared_error(prediction_forget, target).mean()


def combine(grad_retain: Float[Tensor, "p"], grad_forget: Float[Tensor, "p"], eta: float) -> Float[Tensor, "p"]:
    """g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f: the step that erases at rate eta at least ("siss").

    Where g_f is zero there is nothing to erase, and g_r alone remains.
    """
    square = grad_forget.square().sum()
    multiplier = (eta - (grad_retain @ grad_forget) / square).clamp(min=0)
    return grad_retain + torch.where(square > 0, multiplier * grad_forget, 0.0)


def combine_by_cosine(
    grad_retain: Float[Tensor, "p"], grad_forget: Float[Tensor, "p"], eta: float
) -> Float[Tensor, "p"]:
    """g_r + max(eta - cos(g_r, g_f), 0) g_f ("released"). The multiplier lies in [0, 1 + eta], whatever the norms.

    Where g_f is zero, g_r alone remains.
    """
    cosine = (grad_retain @ grad_forget) / (grad_retain.norm() * grad_forget.norm() + 1e-8)
    return grad_retain + (eta - cosine).clamp(min=0) * grad_forget


@final
class EraseDiff(Method):
    """A first-order solution of the paper's bilevel problem, in one of the two forms above.

    Args:
        variant: "siss" or "released"; the latter needs labels.
        eta: > 0. "siss": least rate of erasing, in units of ||g_f||^2; "released": the cosine above which nothing is
            erased.
        multiplier: "released": of g_f; None: by the cosine.
        inner_steps, outer_steps: "released": updates of the erasing objective alone, and steps until the next ones. 0
            inner steps leave them out.
    """

    requires = ("noise",)

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        variant: Literal["siss", "released"] = "siss",
        eta: PositiveFloat = 0.1,
        multiplier: NonNegativeFloat | None = None,
        inner_steps: NonNegativeInt = 80,
        outer_steps: PositiveInt = 36,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained, self.labels = setting.model, setting.labels
        self.released = variant == "released"
        self.eta, self.multiplier = eta, multiplier
        self.inner_steps, self.outer_steps = inner_steps, outer_steps
        self.taken = Counter()
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. released: the erasing objective is minimised on its own, and the weights are put back
        if self.released:
            if self.taken.value % self.outer_steps == 0:
                self._minimise_erasing(batch)
            self.taken.value += 1

        # 2. the retain loss and its gradient
        loss_retain = drawn_loss(self.trained, batch.x0_retain, batch.cond_retain, self.generator).mean()
        grad_retain = self._gradient(loss_retain)

        # 3. the erasing objective and its gradient
        loss_forget = self._erasing(batch)
        grad_forget = self._gradient(loss_forget)

        # 4. both in one direction
        if not self.released:
            direction = combine(grad_retain, grad_forget, self.eta)
        elif self.multiplier is None:
            direction = combine_by_cosine(grad_retain, grad_forget, self.eta)
        else:
            direction = grad_retain + self.multiplier * grad_forget
        self.update.apply(direction)
        pixels = self.trained.num_entries
        return {
            "loss/retain": loss_retain.detach() / pixels,
            "loss/forget": loss_forget.detach() / pixels,
            "grad_norm/retain": grad_retain.norm(),
            "grad_norm/forget": grad_forget.norm(),
        }

    def _erasing(self, batch: Batch) -> Float[Tensor, ""]:
        """`erase_diff_loss` of the forget images at fresh timesteps and noise."""
        model, g, cond = self.trained, self.generator, batch.cond_forget
        timesteps, eps = draw_noise(model, batch.x0_forget, g)
        if not self.released:
            eps_pred, _ = predict_eps(model, batch.x0_forget, eps, timesteps, cond)
            return erase_diff_loss(eps_pred, torch.rand(eps.shape, generator=g, device=eps.device))
        x_t = model.noising(batch.x0_forget, timesteps, cond).sample(eps)
        other = drawn_labels(self.labels.retain, 1, g, cond.device).expand_as(cond)
        return relabelled_loss(model, x_t, timesteps, cond, other).mean()

    def _gradient(self, loss: Float[Tensor, ""]) -> Float[Tensor, "p"]:
        """Of a loss that is summed over pixels ("siss"), or of its mean over them ("released")."""
        return self.update.gradient(loss / self.trained.num_entries if self.released else loss)

    def _minimise_erasing(self, batch: Batch) -> None:
        """theta^K, and back to theta: what stays of it are the optimizer's moments."""
        with self.update.trial() as descend:
            for _ in range(self.inner_steps):
                descend(self._gradient(self._erasing(batch)))

    def stateful(self) -> dict[str, Stateful]:
        steps = {"steps": self.taken} if self.released else {}
        return {**self.update.stateful(), **steps, "noise": GeneratorState(self.generator)}

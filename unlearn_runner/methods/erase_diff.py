"""EraseDiff: erase while descending on what is kept, never against it (2401.05779).

# Notation (variable -> paper)
# grad_retain, grad_forget -> gradients of L_r(theta) and of f(theta), the erasing objective;  eta -> eta
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.methods.denoising import draw_noise, drawn_loss
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.models.model import GenerativeModel, predict_eps, squared_error
from unlearn_runner.options import PositiveFloat
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def erase_diff_loss(eps_pred_forget: Float[Tensor, "b c h w"], uniform: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """f(theta): on forget images the network shall find uniform noise from [0, 1) instead of the true one.

    Squared error summed over pixels, averaged over the batch. In [0, inf).
    """
    return squared_error(eps_pred_forget, uniform).mean()


def combine(grad_retain: Float[Tensor, "p"], grad_forget: Float[Tensor, "p"], eta: float) -> Float[Tensor, "p"]:
    """g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f: the step that erases at rate eta at least.

    Where g_f is zero there is nothing to erase, and g_r alone remains.
    """
    square = grad_forget.square().sum()
    multiplier = (eta - (grad_retain @ grad_forget) / square).clamp(min=0)
    return grad_retain + torch.where(square > 0, multiplier * grad_forget, 0.0)


@final
class EraseDiff(Method):
    """The first-order form of the paper's bilevel problem, as its released code runs it. eta > 0."""

    requires = ("noise",)

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        eta: PositiveFloat = 0.1,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.eta = eta
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. the retain loss and its gradient
        loss_retain = drawn_loss(self.trained, batch.x0_retain, batch.cond_retain, self.generator).mean()
        grad_retain = self.update.gradient(loss_retain)

        # 2. the erasing objective and its gradient
        timesteps, eps = draw_noise(self.trained, batch.x0_forget, self.generator)
        eps_pred, _ = predict_eps(self.trained, batch.x0_forget, eps, timesteps, batch.cond_forget)
        uniform = torch.rand(eps.shape, generator=self.generator, device=eps.device)
        loss_forget = erase_diff_loss(eps_pred, uniform)
        grad_forget = self.update.gradient(loss_forget)

        # 3. both in one direction
        self.update.apply(combine(grad_retain, grad_forget, self.eta))
        pixels = self.trained.num_entries
        return {
            "loss/retain": loss_retain.detach() / pixels,
            "loss/forget": loss_forget.detach() / pixels,
            "grad_norm/retain": grad_retain.norm(),
            "grad_norm/forget": grad_forget.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}

"""NegGrad: gradient ascent on the forget images' denoising loss (folklore; a baseline in 2503.01034)."""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.methods.denoising import predict_noised, squared_error
from unlearn_runner.methods.method import Method, Update
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def neg_grad_loss(
    prediction_forget: Float[Tensor, "b c h w"], target_forget: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """-L_forget, in (-inf, 0]: nothing holds the model back from ruin, which is the point of the baseline.

    Squared error summed over pixels, averaged over the batch.
    """
    return -squared_error(prediction_forget, target_forget).mean()


@final
class NegGrad(Method):
    """Reads forget images only."""

    def __init__(self, model: DiffusionModel, update: Callable[[DiffusionModel], Update], generator: torch.Generator):
        self.reads = Streams(retain=None, forget=True)
        self.networks = (model,)
        self.trained = model
        self.update = update(model)
        self.generator = generator

    @property
    def model(self) -> DiffusionModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        loss = neg_grad_loss(*predict_noised(self.trained, batch.x0_forget, batch.cond_forget, self.generator))
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        return {
            "loss/forget": -loss.detach() / batch.x0_forget[0].numel(),
            "grad_norm/forget": gradient.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}

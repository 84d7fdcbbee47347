"""NegGrad: gradient ascent on the forget images' denoising loss (folklore; a baseline in 2503.01034)."""

from collections.abc import Callable
from typing import final

from jaxtyping import Float
from torch import Tensor

from unlearn_runner.methods.denoising import drawn_loss
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def neg_grad_loss(losses_forget: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """-L_forget, in (-inf, 0]: nothing holds the model back from ruin, which is the point of the baseline.

    L_forget is the denoising loss of the forget images, summed over pixels, averaged over the batch.
    """
    return -losses_forget.mean()


@final
class NegGrad(Method):
    """Reads forget images only."""

    def __init__(self, setting: Setting, update: Callable[[GenerativeModel], Update]):
        self.reads = Streams(retain=None, forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        loss = neg_grad_loss(drawn_loss(self.trained, batch.x0_forget, batch.cond_forget, self.generator))
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        return {
            "loss/forget": -loss.detach() / self.trained.num_entries,
            "grad_norm/forget": gradient.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}

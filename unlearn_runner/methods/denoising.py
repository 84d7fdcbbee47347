"""The denoising loss of DDPM (2006.11239, equation 14): base training, naive deletion, the retrained oracle.

Which of them it is depends only on the images and on where the weights start: all images from scratch, the
retain images from the base, the retain images from scratch.
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.method import Method, Update
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def denoising_loss(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """L_simple: squared error of the predicted noise, mean over pixels and batch. In [0, inf)."""
    return squared_error(prediction, target).mean() / prediction[0].numel()


def squared_error(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """||prediction - target||^2 of each sample: a sum over its pixels."""
    return (prediction - target).square().flatten(1).sum(1)


def draw_noise(
    model: DiffusionModel, x0: Float[Tensor, "b c h w"], generator: torch.Generator
) -> tuple[Int64[Tensor, "b"], Float[Tensor, "b c h w"]]:
    """Timesteps, uniform over the schedule, and standard normal noise, one of each for every image."""
    timesteps = torch.randint(model.num_train_timesteps, (x0.shape[0],), generator=generator, device=x0.device)
    return timesteps, torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)


def predict_noised(
    model: DiffusionModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The network's answer to x_t = gamma_t x0 + sigma_t eps for a random t and eps, and its target."""
    timesteps, eps = draw_noise(model, x0, generator)
    gamma, sigma = model.gamma_sigma(timesteps)
    return model.predict(gamma * x0 + sigma * eps, timesteps, cond), model.target(x0, eps, timesteps)


@final
class Denoising(Method):
    """Trains on the retain stream: X without A ("retain"), or all of X ("all", base training)."""

    def __init__(
        self,
        model: DiffusionModel,
        update: Callable[[DiffusionModel], Update],
        generator: torch.Generator,
        population: str = "retain",
    ):
        if population not in ("retain", "all"):
            raise ConfigurationError(f"method.population must be retain or all, got '{population}'.")
        self.reads = Streams(retain=population, forget=False)
        self.networks = (model,)
        self.trained = model
        self.update = update(model)
        self.generator = generator

    @property
    def model(self) -> DiffusionModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        loss = denoising_loss(*predict_noised(self.trained, batch.x0_retain, batch.cond_retain, self.generator))
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        return {"loss/retain": loss.detach(), "grad_norm/retain": gradient.norm()}

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}

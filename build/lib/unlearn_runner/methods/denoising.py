"""The denoising loss of DDPM (2006.11239, equation 14): base training, naive deletion, the retrained oracle.

Which of them it is depends only on the images and on where the weights start: all images from scratch, the retain
images from the base, the retain images from scratch. The loss is a mean over pixels, too, so a gradient's norm is
seldom cut at 1; SISS's released code sums over pixels when it deletes naively, and cuts at nearly every step.
"""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.models.model import GenerativeModel, denoising_loss
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def draw_noise(
    model: GenerativeModel, x0: Float[Tensor, "b c h w"], generator: torch.Generator
) -> tuple[Int64[Tensor, "b"], Float[Tensor, "b ..."]]:
    """Timesteps, uniform over the schedule, and standard normal noise, one of each for every image."""
    timesteps = torch.randint(model.num_train_timesteps, (x0.shape[0],), generator=generator, device=x0.device)
    return timesteps, draw_eps(model, x0, generator)


def draw_eps(
    model: GenerativeModel, x0: Float[Tensor, "b c h w"], generator: torch.Generator
) -> Float[Tensor, "b ..."]:
    """Standard normal noise for every image."""
    return torch.randn((len(x0), *model.sample_shape), generator=generator, device=x0.device, dtype=x0.dtype)


def drawn_loss(
    model: GenerativeModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    generator: torch.Generator,
) -> Float[Tensor, "b"]:
    """The denoising loss of each image at a random t and eps."""
    return denoising_loss(model, x0, cond, *draw_noise(model, x0, generator))


@final
class Denoising(Method):
    """Trains on the retain stream: X without A ("retain"), or all of X ("all", base training)."""

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        population: Literal["retain", "all"] = "retain",
    ):
        self.reads = Streams(retain=population, forget=False)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        losses = drawn_loss(self.trained, batch.x0_retain, batch.cond_retain, self.generator)
        loss = losses.mean() / self.trained.num_entries
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        return {"loss/retain": loss.detach(), "grad_norm/retain": gradient.norm()}

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}

"""The face that a diffusion model shows to methods and evaluation, whatever it is made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn


class DiffusionModel(nn.Module, ABC):
    """x_t = gamma_t x0 + sigma_t eps with gamma_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).

    x0 is what the network denoises: pixels, or latents. Conditions are class labels [b], prompt embeddings
    [b s d], or None.
    """

    image_shape: tuple[int, int, int]
    num_labels: int | None
    num_train_timesteps: int
    network_evaluations: int  # samples passed forward through the network so far

    @abstractmethod
    def gamma_sigma(self, timesteps: Int64[Tensor, "b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """Amplitude of the signal and of the noise in x_t."""

    @abstractmethod
    def target(
        self, x0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c h w"]:
        """What `predict` should answer for the x_t made of x0 and eps."""

    @abstractmethod
    def predict(
        self,
        x_t: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The network's answer, in the parametrisation of `target`. A timestep may lie between two of the schedule."""

    @abstractmethod
    def noise_of(
        self,
        answer: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        gamma: Float[Tensor, "#b 1 1 1"],
        sigma: Float[Tensor, "#b 1 1 1"],
    ) -> Float[Tensor, "b c h w"]:
        """eps_pred from the network's answer, whatever its parametrisation."""

    @abstractmethod
    def sample(
        self,
        n: int,
        cond: Shaped[Tensor, "{n} ..."] | None,
        generator: torch.Generator,
        num_inference_steps: int,
        sampler: str = "ddim",
        batch_size: int = 256,
    ) -> Float[Tensor, "{n} c h w"]:
        """n images in [-1, 1]. Equal generator states and batch sizes give two models the same noise."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that diffusers' `from_pretrained` loads."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take over the weights of a folder written by `save`."""


def predict_eps(
    model: DiffusionModel,
    x0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."] | None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """eps_pred for x_t = gamma_t x0 + sigma_t eps, and that x_t."""
    gamma, sigma = model.gamma_sigma(timesteps)
    x_t = gamma * x0 + sigma * eps
    return model.noise_of(model.predict(x_t, timesteps, cond), x_t, gamma, sigma), x_t


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout in here, and back as it was afterwards."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)

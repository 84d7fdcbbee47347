"""Which timesteps a step looks at."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, final

import torch
from annotated_types import Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.options import Decay, Width


def range_of(level: Float[Tensor, "b"], num_ranges: int) -> Int64[Tensor, "b"]:
    """In which of `num_ranges` equal ranges of [0, 1) each t / T lies."""
    return (level * num_ranges).long().clamp(max=num_ranges - 1)


class TimestepSampler(ABC):
    """Draws timesteps, with weights that keep the mean over them that of uniform timesteps. Stateful."""

    @abstractmethod
    def draw(
        self, count: int, num_train_timesteps: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Int64[Tensor, "{count}"], Float[Tensor, "{count}"]]:
        """Timesteps and their weights, uniform probability / this sampler's."""

    @abstractmethod
    def learn(self, level: Float[Tensor, "b"], losses: Float[Tensor, "b"]) -> None:
        """What the samples at these t / T cost, before the weights."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class Uniform(TimestepSampler):
    """Every timestep of the schedule alike, as the papers have it. (SISS's released code takes the last alone on CelebA
    and on Stable Diffusion.)
    """

    def draw(
        self, count: int, num_train_timesteps: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Int64[Tensor, "{count}"], Float[Tensor, "{count}"]]:
        timesteps = torch.randint(num_train_timesteps, (count,), generator=generator, device=device)
        return timesteps, torch.ones(count, device=device)

    def learn(self, level: Float[Tensor, "b"], losses: Float[Tensor, "b"]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@final
class SecondMoment(TimestepSampler):
    """p_t proportional to sqrt(E[L_t^2]) (Improved DDPM, 2102.09672, section 3.3), mixed with the uniform distribution.

    The paper keeps the ten newest losses of each of T timesteps, which a run of a few hundred steps never fills;
    here L_t^2 is a moving average over each of `num_levels` equal ranges of t, and within a range t is uniform. Until
    every range has been seen, all is uniform.

    Args:
        uniform_share: of the mixture, in (0, 1]; it bounds the weights by 1 / uniform_share. The paper has 0.001.
    """

    def __init__(
        self, num_levels: Width = 20, ema_decay: Decay = 0.9, uniform_share: Annotated[float, Gt(0), Le(1)] = 0.1
    ):
        self.num_levels, self.ema_decay, self.uniform_share = num_levels, ema_decay, uniform_share
        self.sums = torch.zeros(2, num_levels)  # samples, and their squared losses

    def probabilities(self) -> Float[Tensor, "levels"]:
        """Of the ranges of timesteps; they sum to 1."""
        count, squares = self.sums
        root = (squares / count.clamp(min=torch.finfo(count.dtype).tiny)).sqrt()
        known = (count > 0).all() & (root.sum() > 0)
        learnt = torch.where(known, root / root.sum(), 1 / self.num_levels)
        return (1 - self.uniform_share) * learnt + self.uniform_share / self.num_levels

    def draw(
        self, count: int, num_train_timesteps: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Int64[Tensor, "{count}"], Float[Tensor, "{count}"]]:
        self.sums = self.sums.to(device)
        probabilities = self.probabilities()
        ranges = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        within = torch.rand(count, generator=generator, device=device)
        timesteps = ((ranges + within) * (num_train_timesteps / self.num_levels)).long()
        return timesteps.clamp(max=num_train_timesteps - 1), 1 / (self.num_levels * probabilities[ranges])

    def learn(self, level: Float[Tensor, "b"], losses: Float[Tensor, "b"]) -> None:
        ranges = range_of(level, self.num_levels)
        rows = torch.stack([torch.ones_like(losses), losses.square()])
        found = torch.zeros_like(self.sums).index_add_(1, ranges, rows.to(self.sums))
        self.sums = self.ema_decay * self.sums + found

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums = state_dict["sums"].clone()

"""What the parts of the runner hand to each other."""

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Metrics: TypeAlias = dict[str, Tensor]
"""Detached scalars by key. They stay on their device: only the trainer's log moves them to the host."""


class Batch(NamedTuple):
    """One batch for one optimizer step; images in [-1, 1], or their latents. A stream that the method does not read is
    None.
    """

    x0_retain: Float[Tensor, "b c h w"] | None
    x0_forget: Float[Tensor, "b c h w"] | None
    cond_retain: Shaped[Tensor, "b ..."] | None  # class labels [b], prompt embeddings [b s d], or None
    cond_forget: Shaped[Tensor, "b ..."] | None
    forget_share: float  # K/N: the share of forget images among all images that the base model has seen


class Streams(NamedTuple):
    """Which images a method reads: `retain` from X without A ("retain"), from all of X ("all"), or none."""

    retain: str | None
    forget: bool


class Passes(NamedTuple):
    """How a network's passes are computed; the default changes no bit."""

    precision: torch.dtype | None = None  # of matrix products and convolutions (autocast); None: that of the weights
    parts: int = 1  # of a batch: the activations of one at a time are kept, and computed again in the backward pass
    graphs: Any = None  # GraphedPasses, which replay what they recorded; None: kernel by kernel


@runtime_checkable
class Stateful(Protocol):
    """Anything that a checkpoint stores: tensors, numbers, strings and containers of them, no pickles."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class GeneratorState:
    """A torch.Generator with the face of a Stateful."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["state"].cpu())


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait until they are there."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def make_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each purpose of a run, so that no draw depends on what else was drawn."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, purpose))


def seed_for(seed: int, purpose: str) -> int:
    """Of a purpose's generator, in [0, 2^56)."""
    import hashlib

    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:7], "little")

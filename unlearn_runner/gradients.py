"""Gradients of networks: deterministic where that was asked for, and over all weights as one vector."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from unlearn_runner.errors import ConfigurationError


def gradients(of: Tensor | Sequence[Tensor], over: Sequence[Tensor], *slopes: Any, **settings: Any) -> Sequence[Any]:
    """torch.autograd.grad, by deterministic kernels alone where hardware.deterministic asked a GPU for them.

    Elsewhere torch is asked for them with a warning where it has none. That mode leaves attention its faster backward
    pass, whose bits change from run to run.

    Raises ConfigurationError if torch has no deterministic kernel for the backward pass.
    """
    first = of if isinstance(of, Tensor) else of[0]
    if not (first.is_cuda and torch.is_deterministic_algorithms_warn_only_enabled()):
        return torch.autograd.grad(of, over, *slopes, **settings)
    torch.use_deterministic_algorithms(True)
    try:
        return torch.autograd.grad(of, over, *slopes, **settings)
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not", 1)[0]
        raise ConfigurationError(
            f"hardware.deterministic must be false, got true: torch has no deterministic kernel of {operation} here."
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def as_vector(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Float[Tensor, "p"]:
    """The gradients over each weight as one, in the order in which the weights lie in memory: then nothing but a
    concatenation is needed where gradients lie alike, whatever the memory format, and nothing at all where they are
    parts of such a vector.
    """
    whole = _whole(gradients, weights)
    if whole is not None:
        return whole
    return torch.cat(
        [
            part.reshape(-1) if weight.is_contiguous() else part.permute(_by_stride(weight)).reshape(-1)
            for part, weight in zip(gradients, weights, strict=True)
        ]
    )


def in_parts(vector: Shaped[Tensor, "p"], weights: Sequence[Tensor]) -> list[Tensor]:
    """Views of `as_vector`'s result that lie in memory as the weights do."""
    parts = vector.split([weight.numel() for weight in weights])
    return [part.as_strided(weight.shape, weight.stride()) for part, weight in zip(parts, weights, strict=True)]


def _whole(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Float[Tensor, "p"] | None:
    """The vector whose `in_parts` these are, if they are."""
    first, size = parts[0], sum(weight.numel() for weight in weights)
    if first.untyped_storage().nbytes() < (first.storage_offset() + size) * first.element_size():
        return None
    place = first.data_ptr()
    for part, weight in zip(parts, weights, strict=True):
        if part.data_ptr() != place or part.stride() != weight.stride():
            return None
        place += part.numel() * part.element_size()
    return first.as_strided((size,), (1,))


def _by_stride(weight: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    return sorted(range(weight.ndim), key=lambda dim: -weight.stride(dim))

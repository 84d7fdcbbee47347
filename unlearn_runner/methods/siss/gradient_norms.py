"""The norms of SISS's two gradients: how they are fixed, when they are measured, how much they vary."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.rules import method_options
from unlearn_runner.types import Metrics


@final
class NormFix:
    """Rescales every forget gradient to norm tau (2503.01034, section 4), up or down.

    tau is absolute, as in the released code, or, which is ours, `rho` times a moving average of the retain gradient's
    norm, which needs no tuning to the size of images and network. With neither, the factor is 1. The rescaling is at
    most `max_scale`, ours too, so that a batch that holds next to nothing to forget is not blown up. Stays on the
    device: no host sync.
    """

    def __init__(
        self,
        tau: float | None = None,
        rho: float | None = None,
        ema_decay: float = 0.9,
        max_scale: float = 1e4,
    ):
        method_options.tau_or_rho(tau, rho)
        self.tau, self.rho, self.ema_decay, self.max_scale = tau, rho, ema_decay, max_scale
        self.average: Tensor | None = None

    def scale(self, norm_retain: Float[Tensor, ""], norm_forget: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to multiply the forget gradient by."""
        if self.tau is None and self.rho is None:
            return torch.ones_like(norm_forget)
        if self.average is None:
            self.average = norm_retain
        self.average = self.ema_decay * self.average + (1 - self.ema_decay) * norm_retain
        wanted = self.rho * self.average if self.rho is not None else self.tau
        # 0 / 0 cannot arise from the cap: a forget gradient of zero norm is multiplied by max_scale and stays 0.
        return (wanted / norm_forget).clamp(max=self.max_scale)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


@final
class LastNorms:
    """The norms of the two gradients and the norm fix's factor, as they were last measured; stateful."""

    def __init__(self, every: int):
        self.every = every
        self.steps = 0
        self.last: tuple[Float[Tensor, ""], ...] = ()

    def due(self) -> bool:
        """Whether this step measures them."""
        self.steps += 1
        return (self.steps - 1) % self.every == 0

    def keep(self, norm_retain: Float[Tensor, ""], norm_forget: Float[Tensor, ""], fix: Float[Tensor, ""]) -> None:
        """A batch without a forget sample says nothing of the factor: then the one before stays, at first 0."""
        if self.every > 1:
            before = self.last[2] if self.last else torch.zeros_like(fix)
            self.last = (norm_retain, norm_forget, torch.where(norm_forget > 0, fix, before))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "last": list(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.last = state_dict["steps"], tuple(state_dict["last"])


@final
class GradientVariance:
    """||g - h||^2 / 2 of the gradients g, h of two consecutive steps, which have nearly the same weights and samples of
    their own: the variance of a batch's gradient, summed over the network's weights.

    Keeps a vector of the network's size for each gradient, also in checkpoints.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    def __call__(self, gradients: dict[str, Float[Tensor, "p"]]) -> Metrics:
        """grad_variance/<name> of each; nothing at the first step."""
        found = {
            f"grad_variance/{name}": (gradient - self.before[name]).square().sum() / 2
            for name, gradient in gradients.items()
            if name in self.before
        }
        self.before = gradients
        return found

    def state_dict(self) -> dict[str, Any]:
        return dict(self.before)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict)

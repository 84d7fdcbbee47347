"""A model that was unlearned elsewhere, measured like one of ours: nothing is trained."""

import logging
from typing import final

import torch

from unlearn_runner.cache import digest
from unlearn_runner.methods.method import Method, Setting
from unlearn_runner.models.model import GenerativeModel, require_finite
from unlearn_runner.models.one_step import reader_of
from unlearn_runner.models.patches import patch_of
from unlearn_runner.types import Batch, Metrics, Stateful, Streams
from unlearn_runner.weights import require_finite_weights


@final
class Given(Method):
    """Its one step takes over the weights of a folder, file or hub id; of a whole model with their noise schedule and
    prediction type.

    Args:
        weights: of the base's architecture, in the layouts that model.weights takes, a run's folder for one; a one-step
            generator of the base; or a part of the base, all other weights staying as they are: a network's folder, a
            file with some weights, LoRA (models/patches.py).

    Raises ConfigurationError if there are no such weights, or if they are another architecture's.
    """

    requires = ("base",)
    steps = 1
    reads = Streams(retain=None, forget=False)

    def __init__(self, setting: Setting, weights: str):
        self.weights = weights
        self.patch = patch_of(setting.model, weights, "method.weights")
        whole = self.patch is None
        if whole:
            require_finite_weights(weights, "method.weights")
        self.networks = (reader_of(setting.model, weights, "method.weights") if whole else setting.model,)
        self.taken = Taken(self)

    @property
    def model(self) -> GenerativeModel:
        return self.networks[0]

    def step(self, batch: Batch) -> Metrics:
        """given/moved: how many tensors are not what the base has."""
        self.taken.value = True
        before = self._digests()
        self.take()
        require_finite(self.model, f"method.weights={self.weights}")
        moved = sum(before.get(name) != after for name, after in self._digests().items())
        if self.patch is not None:
            logging.getLogger(__name__).warning(
                f"method.weights: {self.patch.summary}; {moved} tensors of the model are not what the base has"
            )
        return {"given/moved": torch.tensor(float(moved))}

    def take(self) -> None:
        if self.patch is None:
            self.model.load(self.weights, "method.weights")
        else:
            self.patch.apply()

    def _digests(self) -> dict[str, str]:
        """Of each tensor: a copy of all would take as much memory as the model."""
        return {name: digest({name: value}) for name, value in self.model.state_dict().items()}

    def stateful(self) -> dict[str, Stateful]:
        return {"weights": self.model, "taken": self.taken}


@final
class Taken:
    """Whether the given model has taken the base's place; a resumed run takes a whole one over again, for a schedule is
    no weight.
    """

    def __init__(self, method: Given):
        self.method = method
        self.value = False

    def state_dict(self) -> dict[str, bool]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.value = state_dict["value"]
        if self.value and self.method.patch is None:
            self.method.take()

"""A model that was unlearned elsewhere, measured like one of ours: nothing is trained."""

import copy
from typing import final

import torch

from unlearn_runner.errors import ConfigurationError, first_line, folder_or_name
from unlearn_runner.methods.method import Method
from unlearn_runner.models.model import GenerativeModel, pipeline_name, require_finite
from unlearn_runner.models.one_step import OneStep, OneStepPipeline
from unlearn_runner.types import Batch, Metrics, Stateful, Streams


@final
class Given(Method):
    """Its one step takes over the weights of a folder or hub id.

    Args:
        model: the base, whose architecture they fit.
        weights: in the layouts that model.weights takes, a run's model/ for one; or a one-step generator of the base.

    Raises ConfigurationError if there are no such weights, or if they are another architecture's.
    """

    reads = Streams(retain=None, forget=False)

    def __init__(self, model: GenerativeModel, weights: str, generator: torch.Generator):
        self.weights = folder_or_name(weights, "method.weights")
        try:
            if pipeline_name(self.weights) == OneStepPipeline.__name__:
                model = OneStep(model, OneStepPipeline.load_config(self.weights)["timestep"])
            (trial := copy.deepcopy(model)).load(self.weights)
            require_finite(trial, "it")
        except Exception as error:  # what diffusers, torch, the hub's client and its HTTP library raise
            raise ConfigurationError(
                f"method.weights={weights}: expected a model of the base's architecture, its folder or a hub id that "
                f"can be reached; {first_line(error)}"
            ) from error
        self.networks = (model,)

    @property
    def model(self) -> GenerativeModel:
        return self.networks[0]

    def step(self, batch: Batch) -> Metrics:
        self.model.load(self.weights)
        return {}

    def stateful(self) -> dict[str, Stateful]:
        return {"weights": self.model}

"""A model that was unlearned elsewhere, measured like one of ours: nothing is trained."""

from typing import final

from unlearn_runner.methods.method import Method, Setting
from unlearn_runner.models.model import GenerativeModel, require_finite
from unlearn_runner.models.one_step import reader_of
from unlearn_runner.types import Batch, Metrics, Stateful, Streams


@final
class Given(Method):
    """Its one step takes over the weights of a folder or hub id, with their noise schedule and prediction type.

    Args:
        weights: of the base's architecture, in the layouts that model.weights takes, a run's folder for one; or a
            one-step generator of the base.

    Raises ConfigurationError if there are no such weights, or if they are another architecture's.
    """

    requires = ("base",)
    steps = 1
    reads = Streams(retain=None, forget=False)

    def __init__(self, setting: Setting, weights: str):
        self.weights = weights
        self.networks = (reader_of(setting.model, weights, "method.weights"),)
        self.taken = Taken(self)

    @property
    def model(self) -> GenerativeModel:
        return self.networks[0]

    def step(self, batch: Batch) -> Metrics:
        self.taken.value = True
        self.model.load(self.weights, "method.weights")
        require_finite(self.model, f"method.weights={self.weights}")
        return {}

    def stateful(self) -> dict[str, Stateful]:
        return {"weights": self.model, "taken": self.taken}


@final
class Taken:
    """Whether the given model has taken the base's place; a resumed run takes it over again, for a schedule is no
    weight.
    """

    def __init__(self, method: Given):
        self.method = method
        self.value = False

    def state_dict(self) -> dict[str, bool]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        if state_dict["value"]:
            self.method.step(Batch(None, None, None, None, 0.0))

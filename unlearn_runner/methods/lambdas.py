"""Who chooses lambda, SISS's share of samples drawn from the forget image, at every step."""

from abc import ABC, abstractmethod
from typing import Any, final

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.types import Metrics


class LambdaController(ABC):
    """Chooses lambda in [0, 1] from what the previous step measured. Stateful: checkpoints store it."""

    @abstractmethod
    def next(self, last: Metrics) -> float: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class LastMetrics:
    """What the previous step measured, kept for the controller and for checkpoints."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.metrics)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = dict(state_dict)


@final
class Constant(LambdaController):
    """The same lambda at every step: static SISS."""

    def __init__(self, value: float):
        if not 0 <= value <= 1:
            raise ConfigurationError(f"method.lambd must lie in [0, 1], got {value}.")
        self.value = float(value)

    def next(self, last: Metrics) -> float:
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

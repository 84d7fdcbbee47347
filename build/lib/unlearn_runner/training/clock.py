"""Progress and cost of training, and the listeners that receive its events."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.types import Metrics, Stateful

COSTS = ("seconds", "images", "network_evaluations")


@final
@dataclass
class Clock:
    """How far training is, and what it has cost until now. The trainer owns it, and alone moves it on.

    Args:
        step: optimizer steps, rehearsals included: the log's x-axis.
        run_step: those since the weights were last the pretrained ones.
        images: drawn from the data.
        seconds: of training, evaluations not included.
        network_evaluations: samples passed forward through the networks that a step runs.
        rehearsing: whether what comes of the steps is not the result yet.
        rehearsed: what all rehearsals together cost, by the names of COSTS; empty while or where there are none.
    """

    step: int = 0
    run_step: int = 0
    images: int = 0
    seconds: float = 0.0
    network_evaluations: int = 0
    rehearsing: bool = False
    rehearsed: dict[str, float] = field(default_factory=dict)

    def costs(self) -> dict[str, float]:
        """By their keys in a summary."""
        spent = {f"cost/{name}": getattr(self, name) for name in COSTS}
        return spent | {f"cost/policy_{name}": value for name, value in self.rehearsed.items()}

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, copy.deepcopy(state_dict[name]))


class Listener(NamedTuple):
    """Receives the events of training, by one function for each event that it needs.

    Functions instead of methods to be overridden: who hears one event writes one, nobody inherits those that do
    nothing, and a name that is no event is refused where it is written. The clock is the trainer's own, and goes on.
    """

    stepped: Callable[[Clock, Metrics], Any] | None = None  # after every step, before anything of it is written
    logged: Callable[[Clock, dict[str, float]], Any] | None = None  # a step's line, with "seconds" and "images" so far
    noted: Callable[[Clock, dict[str, float]], Any] | None = None  # something else than a step's own line
    evaluate: Callable[[Clock, GenerativeModel], Any] | None = None  # an evaluation on the way is due
    finish: Callable[[Clock, GenerativeModel], Any] | None = None  # training is over and the model is the result
    state: Stateful | None = None  # what a checkpoint stores of it, so that a resumed run goes on where it stopped

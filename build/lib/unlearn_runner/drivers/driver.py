"""Who calls Trainer.step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

from unlearn_runner.methods.method import Method
from unlearn_runner.training.trainer import Plan, Trainer


class Driver(ABC):
    """Owns the loop."""

    extendable: bool  # whether a run may be resumed with more steps than it was begun with

    @abstractmethod
    def total_steps(self, method: Method, plan: Plan) -> int:
        """All steps that the loop makes, rehearsals included. Raises ConfigurationError if it cannot make them so."""

    @abstractmethod
    def prepare(self, trainer: Trainer) -> Callable[[], Any]:
        """The loop, ready to be called; before a checkpoint is read, which fills what listens to the trainer here.

        After the call `trainer.method.model` is the unlearned model, evaluated and saved.
        """


@final
class LoopDriver(Driver):
    """The plain loop of every loss-based method."""

    extendable = True

    def total_steps(self, method: Method, plan: Plan) -> int:
        return plan.max_steps

    def prepare(self, trainer: Trainer) -> Callable[[], Any]:
        def loop() -> None:
            while not trainer.done:
                trainer.step()

        return loop

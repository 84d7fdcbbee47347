"""Who calls Trainer.step."""

from abc import ABC, abstractmethod
from typing import final

from unlearn_runner.methods.method import Method
from unlearn_runner.training.trainer import Plan, Trainer


class Driver(ABC):
    """Owns the loop. When `run` returns, `trainer.method.model` is the unlearned model, evaluated and saved."""

    extendable: bool  # whether a run may be resumed with more steps than it was begun with

    @abstractmethod
    def total_steps(self, method: Method, plan: Plan) -> int:
        """All steps that `run` will make, rehearsals included. Raises ConfigurationError if it cannot make them so."""

    @abstractmethod
    def prepare(self, trainer: Trainer) -> None:
        """Before a checkpoint is read: make what it is to fill."""

    @abstractmethod
    def run(self, trainer: Trainer) -> None: ...


@final
class LoopDriver(Driver):
    """The plain loop of every loss-based method."""

    extendable = True

    def total_steps(self, method: Method, plan: Plan) -> int:
        return plan.max_steps

    def prepare(self, trainer: Trainer) -> None:
        pass

    def run(self, trainer: Trainer) -> None:
        while not trainer.done:
            trainer.step()

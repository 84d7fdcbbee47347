"""Who calls Trainer.step."""

from abc import ABC, abstractmethod
from typing import final

from unlearn_runner.training.trainer import Trainer


class Driver(ABC):
    """Owns the loop. When `run` returns, `trainer.method.model` is the unlearned model, evaluated and saved."""

    @abstractmethod
    def run(self, trainer: Trainer) -> None: ...


@final
class LoopDriver(Driver):
    """The plain loop of every loss-based method."""

    def run(self, trainer: Trainer) -> None:
        while not trainer.done:
            trainer.step()

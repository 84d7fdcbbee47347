"""The body of the training loop, the same for every method and every driver."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch

from unlearn_runner.cache import fingerprint
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError
from unlearn_runner.methods.method import Method
from unlearn_runner.models.model import GenerativeModel, require_finite
from unlearn_runner.options import BatchSize, PositiveInt
from unlearn_runner.spec import DataSpec
from unlearn_runner.training.checkpoint import Checkpoint, Checkpoints, damaged
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.types import Metrics, Stateful


@dataclass(frozen=True)
class Plan:
    """How long to train, and how often to do what.

    Args:
        max_steps: optimizer steps.
        batch_size: retain images, and as many forget images, in each step.
        log_every: steps between two logged lines. Losses of all steps are checked when a line is logged.
        evaluate_every: steps between two evaluations on the way; None: only at the end.
        checkpointing_steps: steps between two checkpoints; None: only when interrupted and at the end.
        checkpoints_total_limit: how many checkpoints to keep; None: all.
        keep_checkpoints: keep them also when the run has finished, so that a longer one can go on from them.
        init: where the weights start, "base" or "scratch".
    """

    max_steps: PositiveInt
    batch_size: BatchSize
    log_every: PositiveInt = 1
    evaluate_every: PositiveInt | None = None
    checkpointing_steps: PositiveInt | None = None
    checkpoints_total_limit: PositiveInt | None = None
    init: Literal["base", "scratch"] = "base"
    keep_checkpoints: bool = False


class Recorder(ABC):
    """Receives what happens in training. Stateful, so that a resumed run's record goes on where it stopped."""

    @abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None:
        """One logged step; `values` includes "seconds" and "images" so far."""

    @abstractmethod
    def note(self, step: int, values: dict[str, float]) -> None:
        """Something else than a step's own line."""

    @abstractmethod
    def evaluate(self, model: GenerativeModel, step: int) -> None:
        """An evaluation on the way is due."""

    @abstractmethod
    def finish(self, model: GenerativeModel, step: int) -> None:
        """Training is over and `model` is the result."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def planned(plan: Plan, method: Method) -> Plan:
    """The plan with as many steps as the method takes, where that does not depend on the run."""
    return plan if method.steps is None else replace(plan, max_steps=method.steps)


COSTS = ("seconds", "images", "network_evaluations")
DECIDING = ("loss/", "grad_norm/", "agent/reward")  # a run whose values here are not finite has diverged


def identity_of(method: Method, spec: DataSpec) -> dict[str, str]:
    """What a checkpoint of training on the side must agree with; the rest of what decides it is in its cache's key."""
    shapes = {name: list(weight.shape) for name, weight in method.networks[0].named_parameters()}
    return {"method": type(method).__name__, "model": fingerprint(shapes), "dataset": spec.name}


@final
class Trainer:
    """Lets the method begin. Then draws batches, lets it take its steps, logs, evaluates and writes checkpoints.

    The weights that the method begins with must be in the model when the trainer is made.

    Knows no loss and holds no loop: a Driver calls `step` until `done`. `total_steps` counts all steps and is
    the log's x-axis; `run_step` starts again at `reset`. A driver may have `after_step` called with each step's
    metrics before anything is written, and a `companion`'s state stored with checkpoints. While it is `rehearsing`,
    steps are logged and counted, but what comes of them is not the result: nothing is evaluated or finished.

    Raises:
        NonFiniteError: from `step`, when a loss or a gradient's norm of any step so far is not finite, or, before a
            checkpoint is written, a weight.
        Interrupted: from `step`, after SIGINT, SIGTERM or SIGHUP, when the step is finished and a checkpoint written.
    """

    def __init__(
        self,
        method: Method,
        stream: BatchStream,
        plan: Plan,
        recorder: Recorder,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        identity: dict[str, Any],
        resettable: bool = False,
    ):
        self.method = method
        self.stream = stream
        self.plan = plan
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.interrupts = interrupts
        self.identity = identity
        self.run_step = 0
        self.total_steps = 0
        self.images = 0
        self.network_evaluations = 0
        self.seconds = 0.0
        self.rehearsing = False
        self.rehearsed: dict[str, float] = {}  # what all rehearsals cost
        self.after_step: Callable[[Metrics], None] | None = None
        self.companion: Stateful | None = None
        self._evaluated_at = 0
        self._saved_at: tuple[int, Path] | None = None
        self._unlogged: list[tuple[int, Metrics]] = []
        method.begin(stream.images() if "images" in method.requires else None)
        self._initial = copy.deepcopy(self._learner_state()) if resettable else None

    @property
    def done(self) -> bool:
        return self.run_step >= self.plan.max_steps

    def step(self) -> Metrics:
        """One optimizer step and all that is due after it."""
        with self.interrupts.shield():
            started = time.perf_counter()
            evaluations = self._evaluations()
            batch = self.stream.next()
            metrics = self.method.step(batch)
            self.run_step += 1
            self.total_steps += 1
            self.images += sum(len(x) for x in (batch.x0_retain, batch.x0_forget) if x is not None)
            self.network_evaluations += self._evaluations() - evaluations
            self._unlogged.append((self.total_steps, metrics))
            if self.after_step is not None:
                self.after_step(metrics)
            if self.done or self.run_step % self.plan.log_every == 0:
                self.flush(started)
            else:
                self.seconds += time.perf_counter() - started
            if self._is_due(self.plan.checkpointing_steps) or (self.done and not self.rehearsing):
                self.save()
        self._evaluate_or_finish()
        return metrics

    def flush(self, started: float | None = None) -> None:
        """Move the waiting metrics to the host in one transfer, check those that decide, log the newest.

        What is a diagnostic alone, such as weights/* or lambda/*, ends no run: 0 / 0 may be its right value.
        """
        if not self._unlogged:
            return
        steps = [step for step, metrics in self._unlogged for _ in metrics]
        keys = [key for _, metrics in self._unlogged for key in metrics]
        tensors = [value.detach().double() for _, metrics in self._unlogged for value in metrics.values()]
        values = torch.stack(tensors).tolist() if tensors else []
        if started is not None:
            self.seconds += time.perf_counter() - started
        newest = self._unlogged[-1][0]
        self._unlogged.clear()
        for step, key, value in zip(steps, keys, values, strict=True):
            if key.startswith(DECIDING) and not math.isfinite(value):
                raise NonFiniteError(f"{key} became {value} at step {step}")
        line = {key: value for step, key, value in zip(steps, keys, values, strict=True) if step == newest}
        self.recorder.log(newest, {"seconds": self.seconds, "images": self.images, **line})

    def reset(self) -> None:
        """Back to the pretrained weights, fresh optimizers and generators; `total_steps` goes on."""
        if self._initial is None:
            raise RuntimeError("this trainer was built without resettable=True")
        self.run_step = 0
        self._load_learner_state(copy.deepcopy(self._initial))

    def end_rehearsals(self) -> None:
        """From now on it counts: what was spent so far is kept apart, and the next step is the run's first."""
        self.reset()
        self.rehearsing = False
        self.rehearsed = {name: getattr(self, name) for name in COSTS}

    def save(self) -> Path:
        """Write a checkpoint of this step, unless there is one: what comes between two steps is made again from it."""
        if self._saved_at is not None and self._saved_at[0] == self.total_steps and self._saved_at[1].is_dir():
            return self._saved_at[1]
        self.flush()
        require_finite(self.method.networks[0], f"after step {self.total_steps} the model")
        path = self.checkpoints.save(self.total_steps, self.state_dict(), self.identity)
        self._saved_at = (self.total_steps, path)
        return path

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, with the evaluation that was due when it was written."""
        checkpoint.require(self.identity)
        try:
            with self.interrupts.shield():
                self.load_state_dict(checkpoint.state)
        except ConfigurationError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # it is whole, and not what it should be
            raise damaged(checkpoint.folder, error) from error
        self._evaluate_or_finish()

    def state_dict(self) -> dict[str, Any]:
        counters = ("run_step", "total_steps", *COSTS, "rehearsing", "rehearsed", "_evaluated_at")
        return {
            **self._learner_state(),
            "companion": None if self.companion is None else self.companion.state_dict(),
            "recorder": self.recorder.state_dict(),
            "counters": {name: getattr(self, name) for name in counters},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_at = None
        self._load_learner_state(state_dict)
        if self.companion is not None:
            self.companion.load_state_dict(state_dict["companion"])
        self.recorder.load_state_dict(state_dict["recorder"])
        for name, value in state_dict["counters"].items():
            setattr(self, name, value)

    def _learner_state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.method.stateful().items()}
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state(), "cuda": devices}  # dropout draws from these
        return {"method": parts, "stream": self.stream.state_dict(), "rng": rng}

    def _load_learner_state(self, state: dict[str, Any]) -> None:
        for name, part in self.method.stateful().items():
            part.load_state_dict(state["method"][name])
        self.stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def _evaluations(self) -> int:
        return sum(network.network_evaluations for network in self.method.networks)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.run_step % every == 0

    def _evaluate_or_finish(self) -> None:
        """Whichever of them is due. Of one that is interrupted the record keeps nothing, for it is made again."""
        if self.rehearsing:
            return
        due = self._is_due(self.plan.evaluate_every) and self._evaluated_at < self.total_steps
        if not self.done and not due:
            return
        record, evaluated_at = self.recorder.state_dict(), self._evaluated_at
        try:
            if self.done:
                self.recorder.finish(self.method.model, self.total_steps)
            else:
                self.recorder.evaluate(self.method.model, self.total_steps)
                self._evaluated_at = self.total_steps
        except Interrupted:
            self.recorder.load_state_dict(record)
            self._evaluated_at = evaluated_at
            raise

"""The body of the training loop, the same for every method and every driver."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch

from unlearn_runner.cache import fingerprint
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.errors import Interrupted, NonFiniteError
from unlearn_runner.methods.method import Mask, Method
from unlearn_runner.methods.salun import salient
from unlearn_runner.models.model import require_finite
from unlearn_runner.options import BatchSize, PositiveInt
from unlearn_runner.spec import DataSpec
from unlearn_runner.training.checkpoint import Checkpoint, Checkpoints, reading_checkpoint
from unlearn_runner.training.clock import COSTS, Clock, Listener
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.types import GeneratorState, Metrics, seed_for


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


def planned(plan: Plan, method: Method) -> Plan:
    """The plan with as many steps as the method takes, where that does not depend on the run."""
    return plan if method.steps is None else replace(plan, max_steps=method.steps)


DECIDING = ("loss/", "grad_norm/", "agent/reward")  # a run whose values here are not finite has diverged


def identity_of(method: Method, spec: DataSpec) -> dict[str, str]:
    """What a checkpoint of training on the side must agree with; the rest of what decides it is in its cache's key."""
    shapes = {name: list(weight.shape) for name, weight in method.networks[0].named_parameters()}
    return {"method": type(method).__name__, "model": fingerprint(shapes), "dataset": spec.name}


def on_device(state: Any, device: torch.device) -> Any:
    """A part's state with its tensors on this device: a checkpoint is read to the CPU. Not those of optimizers, which
    find the place themselves; some of theirs belong on the CPU.
    """
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return state if "param_groups" in state else {key: on_device(value, device) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(on_device(value, device) for value in state)
    return state


@final
class Trainer:
    """Lets the method begin. Then draws batches, lets it take its steps, writes checkpoints and tells its listeners.

    The weights that the method begins with must be in the model when the trainer is made.

    Knows no loss and holds no loop: a Driver calls `step` until `done`. Listeners have names, by which checkpoints
    store their states; each event comes with the clock. While that is `rehearsing`, steps are logged and counted, but
    what comes of them is not the result: nothing is evaluated or finished.

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
        listeners: Mapping[str, Listener],
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        identity: dict[str, Any],
        resettable: bool = False,
    ):
        self.method = method
        self.stream = stream
        self.plan = plan
        self.listeners = dict(listeners)
        self.checkpoints = checkpoints
        self.interrupts = interrupts
        self.identity = identity
        self.clock = Clock()
        self._evaluated_at = 0
        self._saved_at: tuple[int, Path] | None = None
        self._unlogged: list[tuple[int, Metrics]] = []
        self._begin()
        self._initial = copy.deepcopy(self._learner_state()) if resettable else None

    def _begin(self) -> None:
        """Let the method begin, and find the weights that its masks let move. Passes of the network are counted."""
        evaluations, images = self._evaluations(), self.stream.images()
        self.method.begin(images if "images" in self.method.requires else None)
        for part in self.method.stateful().values():
            if isinstance(part, Mask) and part.share is not None:
                part.keep = salient(part.trained, images.forget, part.share)
        self.clock.network_evaluations += self._evaluations() - evaluations

    def listen(self, name: str, listener: Listener) -> None:
        """Add a listener that could not be there before the trainer: one that itself calls `step`."""
        self.listeners[name] = listener

    @property
    def done(self) -> bool:
        return self.clock.run_step >= self.plan.max_steps

    def step(self) -> Metrics:
        """One optimizer step and all that is due after it."""
        with self.interrupts.shield():
            started = time.perf_counter()
            evaluations = self._evaluations()
            batch = self.stream.next()
            metrics = self.method.step(batch)
            self.clock.run_step += 1
            self.clock.step += 1
            self.clock.images += sum(len(x) for x in (batch.x0_retain, batch.x0_forget) if x is not None)
            self.clock.network_evaluations += self._evaluations() - evaluations
            self._unlogged.append((self.clock.step, metrics))
            self._tell("stepped", metrics)
            if self.done or self.clock.run_step % self.plan.log_every == 0:
                self.flush(started)
            else:
                self.charge(time.perf_counter() - started)
            if self._is_due(self.plan.checkpointing_steps) or (self.done and not self.clock.rehearsing):
                self.save()
        self._evaluate_or_finish()
        return metrics

    def note(self, values: dict[str, float]) -> None:
        """Tell the listeners something else than a step's own line."""
        self._tell("noted", values)

    def charge(self, seconds: float) -> None:
        """Count this time as training's."""
        self.clock.seconds += seconds

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
            self.charge(time.perf_counter() - started)
        newest = self._unlogged[-1][0]
        self._unlogged.clear()
        for step, key, value in zip(steps, keys, values, strict=True):
            if key.startswith(DECIDING) and not math.isfinite(value):
                raise NonFiniteError(f"{key} became {value} at step {step}")
        line = {key: value for step, key, value in zip(steps, keys, values, strict=True) if step == newest}
        self._tell("logged", {"seconds": self.clock.seconds, "images": self.clock.images, **line})

    def reset(self) -> None:
        """Back to the pretrained weights, fresh optimizers and generators; the clock's `step` goes on.

        A rehearsal has images, timesteps and noise of its own.
        """
        if self._initial is None:
            raise RuntimeError("this trainer was built without resettable=True")
        self.clock.run_step = 0
        self._load_learner_state(copy.deepcopy(self._initial))
        if self.clock.rehearsing:
            self._draw_apart()

    def rehearse(self) -> None:
        """Until `end_rehearsals` what comes of the steps is not the result."""
        self.clock.rehearsing = True
        self._draw_apart()

    def end_rehearsals(self) -> None:
        """From now on it counts: what was spent so far is kept apart, and the next step is the run's first."""
        self.clock.rehearsing = False
        self.reset()
        self.clock.rehearsed = {name: getattr(self.clock, name) for name in COSTS}

    def _draw_apart(self) -> None:
        """Seed all that is drawn from the present step on: no rehearsal repeats another's draws, or the run's."""
        parts = [part for part in self.method.stateful().values() if isinstance(part, GeneratorState)]
        for generator in (self.stream.generator, *(part.generator for part in parts)):
            generator.manual_seed(seed_for(generator.initial_seed(), f"rehearsal from step {self.clock.step}"))
        torch.manual_seed(seed_for(self.clock.step, "rehearsal"))  # dropout's

    def save(self) -> Path:
        """Write a checkpoint of this step, unless there is one: what comes between two steps is made again from it."""
        step = self.clock.step
        if self._saved_at is not None and self._saved_at[0] == step and self._saved_at[1].is_dir():
            return self._saved_at[1]
        self.flush()
        require_finite(self.method.networks[0], f"after step {step} the model")
        path = self.checkpoints.save(step, self.state_dict(), self.identity)
        self._saved_at = (step, path)
        return path

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, with the evaluation that was due when it was written."""
        checkpoint.require(self.identity)
        # it is whole, and may not be what it should be
        with (
            reading_checkpoint(checkpoint.folder, KeyError, TypeError, ValueError, RuntimeError),
            self.interrupts.shield(),
        ):
            self.load_state_dict(checkpoint.state)
        if checkpoint.folder.parent == self.checkpoints.folder.resolve():  # else it is that of a shorter run
            self._saved_at = (self.clock.step, checkpoint.folder)
        self._evaluate_or_finish()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._learner_state(),
            "clock": self.clock.state_dict(),
            "evaluated_at": self._evaluated_at,
            "listeners": {
                name: listener.state.state_dict()
                for name, listener in self.listeners.items()
                if listener.state is not None
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_at = None
        self._load_learner_state(state_dict)
        for name, listener in self.listeners.items():
            if listener.state is not None:
                listener.state.load_state_dict(state_dict["listeners"][name])
        self.clock.load_state_dict(state_dict["clock"])
        self._evaluated_at = state_dict["evaluated_at"]

    def _learner_state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.method.stateful().items()}
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state(), "cuda": devices}  # dropout draws from these
        return {"method": parts, "stream": self.stream.state_dict(), "rng": rng}

    def _load_learner_state(self, state: dict[str, Any]) -> None:
        device = next(self.method.networks[0].parameters()).device
        for name, part in self.method.stateful().items():
            part.load_state_dict(on_device(state["method"][name], device))
        self.stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def _evaluations(self) -> int:
        return sum(network.network_evaluations for network in self.method.networks)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.clock.run_step > 0 and self.clock.run_step % every == 0

    def _tell(self, event: str, what: Any) -> None:
        for listener in self.listeners.values():
            if (function := getattr(listener, event)) is not None:
                function(self.clock, what)

    def _evaluate_or_finish(self) -> None:
        """Whichever of them is due. Of one that is interrupted listeners keep nothing, for it is made again."""
        if self.clock.rehearsing:
            return
        due = self._is_due(self.plan.evaluate_every) and self._evaluated_at < self.clock.step
        if not self.done and not due:
            return
        evaluating = [listener for listener in self.listeners.values() if listener.evaluate or listener.finish]
        states = [listener.state for listener in evaluating if listener.state is not None]
        before, evaluated_at = [state.state_dict() for state in states], self._evaluated_at
        try:
            if self.done:
                self._tell("finish", self.method.model)
            else:
                self._tell("evaluate", self.method.model)
                self._evaluated_at = self.clock.step
        except Interrupted:
            for state, kept in zip(states, before, strict=True):
                state.load_state_dict(kept)
            self._evaluated_at = evaluated_at
            raise

"""The unlearning run as a Markov decision process (2512.01054, section 5.3): one step is one step of the Trainer.

# Notation
# observation -> s_k = [L_x, L_a, ||g_x||, ||g_a||, lambda_{k-1}, k / T] (RLLambda says under which weights)
# action -> lambda_k, or its logit z_k
"""

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple, final

import gymnasium
import numpy as np
import torch
from jaxtyping import Float32
from stable_baselines3.common.running_mean_std import RunningMeanStd

from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.methods.siss.rl_lambda import RLLambda
from unlearn_runner.training.clock import Clock
from unlearn_runner.training.trainer import Trainer
from unlearn_runner.types import Metrics

BOUND = 10.0  # of standardised features, and of the logit


def squash(z: float, low: float, high: float) -> float:
    """low + (high - low) sigmoid(z). A policy that is Gaussian in z needs no correction: PPO compares densities of the
    same z, whose ratio a bijection does not change.
    """
    return low + (high - low) / (1 + math.exp(-z))


class Transition(NamedTuple):
    """What one step of the environment answered."""

    lambd: float
    observation: list[float]
    reward: float
    terminated: bool


@final
class Standardised:
    """log1p of losses and gradient norms, with the sign of negative ones, less their running mean over their running
    standard deviation, cut to [-10, 10]. The statistics belong to the policy and are saved with it.
    """

    def __init__(self, size: int):
        self.statistics = RunningMeanStd(shape=(size,))
        self.frozen = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = np.sign(values) * np.log1p(np.abs(values))
        if not self.frozen:
            self.statistics.update(values[None])
        standardised = (values - self.statistics.mean) / np.sqrt(self.statistics.var + 1e-8)
        return np.clip(standardised, -BOUND, BOUND)

    def state_dict(self) -> dict[str, Any]:
        found = self.statistics
        return {"mean": found.mean.tolist(), "var": found.var.tolist(), "count": float(found.count)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError unless they are finite numbers for as many features."""
        found = self.statistics
        mean, var = (np.array(state_dict[name], dtype=float) for name in ("mean", "var"))
        count = float(state_dict["count"])
        if mean.shape != found.mean.shape or var.shape != found.var.shape:
            raise ValueError(f"statistics of {mean.size} features instead of {found.mean.size}")
        if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all() and math.isfinite(count)):
            raise ValueError("the statistics of its features are no finite numbers")
        found.mean, found.var, found.count = mean, var, count


@final
class LambdaEnv(gymnasium.Env):
    """`step(action)` sets lambda and calls `Trainer.step`; `reset` goes back to the base model.

    The trainer must tell it of its steps: `stepped` makes the transition.

    The reward is the method's ("agent/reward"). An episode ends after the run's T steps, of which the agent sees the
    share that is gone; an online run never ends: the agent is stopped, without notice.

    After `replay()` the first steps answer with the transitions of a checkpoint and train nothing: an agent that is put
    back to the beginning of an interrupted rollout walks through it once more.

    Args:
        trainer: of `method=rl_lambda`; for `reset` after a step it must be resettable.
        logits: the action is z, squashed to lambda here (see `squash`); false: it is lambda.
        outside: everything that is not the agent's runs in this context.

    Raises:
        NonFiniteError: from `step`, when a loss, a norm, what the agent sees or the reward is not finite.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own way

    def __init__(
        self,
        trainer: Trainer,
        logits: bool,
        outside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        if not isinstance(trainer.method, RLLambda):
            raise ConfigurationError(
                f"an agent for lambda needs method=rl_lambda, got {type(trainer.method).__name__}."
            )
        self.trainer, self.logits, self.outside = trainer, logits, outside
        self.method: RLLambda = trainer.method
        self.seen = self.method.observed
        self.features = Standardised(len(self.seen))
        low, high = (-BOUND, BOUND) if logits else (self.method.low, self.method.high)
        self.action_space = gymnasium.spaces.Box(low, high, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-BOUND, BOUND, (len(self.seen) + 2,), np.float32)
        self.transitions: list[Transition] = []  # since `forget`
        self.observation = self.first_observation()
        self.steps_return = 0.0
        self._replayed: deque[Transition] = deque()
        self._left: float | None = None  # when the agent's turn began

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if not self._replayed and self.trainer.clock.run_step > 0:
            with self.outside():
                self.trainer.reset()
            self.observation, self.steps_return = self.first_observation(), 0.0
        return self.first_observation(), {}

    def step(self, action: Float32[np.ndarray, "1"]) -> tuple[np.ndarray, float, bool, bool, dict]:
        lambd = self.lambd_of(action)
        if self._replayed:
            transition = self._replayed.popleft()
            if transition.lambd != lambd:
                raise RuntimeError(
                    f"the resumed agent chose lambda {lambd} where it had chosen {transition.lambd}: "
                    "is this another version of torch or Stable-Baselines3?"
                )
        else:
            if self.trainer.done:
                raise RuntimeError("the run is over: reset() begins another")
            self.charge()
            with self.outside(), self.trainer.interrupts.lifted():
                self.method.lambd.choose(lambd)
                self.trainer.step()
            self._left = perf_counter()
            transition = self.transitions[-1]
        return np.float32(transition.observation), transition.reward, transition.terminated, False, {}

    def lambd_of(self, action: Float32[np.ndarray, "1"]) -> float:
        """The lambda that an action means."""
        z = float(action[0])
        low, high = self.method.low, self.method.high
        return squash(z, low, high) if self.logits else min(max(z, low), high)  # float32 may lie a rounding outside

    def first_observation(self) -> Float32[np.ndarray, "features"]:
        """Before the first step nothing was seen, of the base neither: the mean of all that was."""
        return self._observation(np.zeros(len(self.seen)), self.method.initial, 0.0)

    def charge(self) -> None:
        """Count the agent's time since the last step as the run's."""
        if self._left is not None:
            self.trainer.charge(perf_counter() - self._left)
            self._left = None

    def forget(self) -> None:
        """A new rollout begins."""
        self.transitions.clear()

    def replay(self) -> None:
        """Answer the next steps with the transitions there are: those have been trained already."""
        self._replayed = deque(self.transitions)

    def stepped(self, clock: Clock, metrics: Metrics) -> None:
        """Called by the trainer after its update and before it writes: a checkpoint holds the step's transition."""
        *values, reward = torch.stack([metrics[key].double() for key in (*self.seen, "agent/reward")]).tolist()
        if not all(map(math.isfinite, (*values, reward))):
            self.trainer.flush()  # names what of the step is not finite
            raise NonFiniteError(f"the state after step {clock.step} holds values that are not finite numbers")
        self.observation = self._observation(
            self.features(np.array(values)),
            self.method.lambd.value,
            clock.run_step / self.trainer.plan.max_steps,
        )
        over = self.trainer.done and clock.rehearsing
        self.transitions.append(Transition(self.method.lambd.value, self.observation.tolist(), reward, over))
        self.steps_return += reward
        if self.trainer.done:
            self.trainer.note({"agent/return": self.steps_return})

    def _observation(self, features: np.ndarray, lambd: float, progress: float) -> Float32[np.ndarray, "features"]:
        low, high = self.method.low, self.method.high
        return np.array([*features, (lambd - low) / (high - low), progress], dtype=np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {
            "transitions": [list(transition) for transition in self.transitions],
            "observation": self.observation.tolist(),
            "return": self.steps_return,
            "features": self.features.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_return = state_dict["return"]
        self.features.load_state_dict(state_dict["features"])
        self.observation = np.float32(state_dict["observation"])
        self.transitions = [Transition(*values) for values in state_dict["transitions"]]

"""Stable-Baselines3 drives the run: its `learn` calls LambdaEnv.step, and that Trainer.step (2512.01054, appendix C).

Resuming. During a rollout an SB3 agent only acts: weights, optimizers and what it has stored before stay as they were
when the rollout began. So a checkpoint holds the agent as of then and the rollout's transitions so far; a resumed agent
walks through them again, drawing the same actions from the same generators, and goes on from there.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from unlearn_runner.cache import atomic, write_json
from unlearn_runner.distributed import is_first
from unlearn_runner.drivers.driver import Driver
from unlearn_runner.drivers.lambda_env import LambdaEnv
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.methods.siss.lambda_objectives import kl_to_gaussian
from unlearn_runner.methods.siss.rl_lambda import RLLambda
from unlearn_runner.rules import method_options
from unlearn_runner.training.clock import Listener
from unlearn_runner.training.trainer import Plan, Trainer

POLICY_VERSION = 1
REPLAYED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@final
class LambdaDriver(Driver):
    """Trains the agent of `method=rl_lambda` online or in episodes, or plays a policy that was trained before."""

    extendable = False  # the agent sees the share of the run's steps that is gone

    def total_steps(self, method: RLLambda, plan: Plan) -> int:
        if not isinstance(method, RLLambda):
            raise ConfigurationError(f"this driver is for method=rl_lambda, got {type(method).__name__}.")
        settings = method.agent.keywords
        on_policy, ent_coef = issubclass(method.agent.func, OnPolicyAlgorithm), settings.get("ent_coef", 0.0)
        use_sde = settings.get("use_sde", False)
        method_options.policy_of_lambda(on_policy, ent_coef, use_sde, method.state_dependent_std, method.kl_weight)
        if method.policy is not None:
            load_policy(method)
        else:
            rollout_steps(method, plan)
        return plan.max_steps * (method.rehearsals + 1)

    def prepare(self, trainer: Trainer) -> "Agent":
        if trainer.method.rehearsals > 0:
            trainer.rehearse()
        agent = Agent(trainer)
        trainer.listen("agent", Listener(stepped=agent.env.stepped, state=agent))
        return agent


def rollout_steps(method: RLLambda, plan: Plan) -> int:
    """Steps between two updates of the policy. Raises ConfigurationError unless whole rollouts make up the run."""
    algorithm, settings = method.agent.func, method.agent.keywords
    if issubclass(algorithm, OffPolicyAlgorithm):
        name, steps, total = "method.agent.train_freq", settings.get("train_freq", 1), plan.max_steps
    elif method.training == "episodic":
        method_options.whole_episodes(method.training, method.episodes, method.episodes_per_update)
        name, steps, total = "method.episodes_per_update", plan.max_steps * method.episodes_per_update, 0
    else:
        name, steps, total = "method.update_every", method.update_every, plan.max_steps
    method_options.divides(total, name, steps)
    if issubclass(algorithm, OnPolicyAlgorithm):
        method_options.batches_of(steps, name, settings.get("batch_size"))
    return steps


@final
class Agent:
    """An SB3 algorithm and its environment, with random generators of its own and a state that checkpoints store.

    Called, it makes the run, and before it all rehearsals.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.method: RLLambda = trainer.method
        self.randomness = Randomness()
        algorithm = self.method.agent.func
        on_policy = issubclass(algorithm, OnPolicyAlgorithm)
        self.env = LambdaEnv(trainer, logits=on_policy, outside=self.randomness.outside)
        self.rollout: dict[str, Any] = {}  # the agent when the rollout began, as far as a rollout changes it
        self.trained = self.method.policy is not None
        self.steps_to_learn = trainer.plan.max_steps * (self.method.rehearsals or 1)
        if on_policy:  # one that only plays makes no rollouts; its batch spares SB3's warning
            batch = self.method.agent.keywords.get("batch_size", 64)
            sizes = {"n_steps": batch if self.trained else rollout_steps(self.method, trainer.plan)}
            sizes |= policy_of(self.method)
        else:
            sizes = {"buffer_size": self.steps_to_learn}
        with self.randomness.inside():
            self.model: BaseAlgorithm = self.method.agent(
                env=DummyVecEnv([lambda: self.env]), seed=self.method.seed, device="cpu", **sizes
            )
            self.model.set_logger(Logger(None, [NoteWriter(trainer)]))
        if self.trained:
            weights, statistics = load_policy(self.method)
            try:
                self.model.policy.load_state_dict(weights)
                self.env.features.load_state_dict(statistics)
            except Exception as error:  # whatever a foreign file makes torch and NumPy raise
                raise damaged_policy(self.method.policy, error) from error
            self.env.features.frozen = True

    def __call__(self) -> None:
        # 1. The policy learns: in the run itself, or in episodes before it
        if not self.trained:
            with self.trainer.interrupts.shield():  # only env.step may be interrupted: an update would be half done
                self.learn()
                self.save(self.trainer.checkpoints.folder.parent / "policy")

        # 2. The run with the policy's mean action, if it was not that run in which it learnt
        self.play()

    def learn(self) -> None:
        """Until the environment has made `steps_to_learn`, those before a checkpoint included."""
        with self.randomness.inside():
            remaining = self.steps_to_learn - self.model.num_timesteps
            callback = RolloutStart(self.rollout_started)
            self.model.learn(remaining, callback, log_interval=None, reset_num_timesteps=False)
            self.model.logger.dump()
        self.env.charge()
        self.trained = True
        self.env.forget()
        if self.trainer.clock.rehearsing:
            self.trainer.end_rehearsals()

    def play(self) -> None:
        """One run with the policy's mean action; goes on where a checkpoint left off."""
        self.env.features.frozen = True
        with self.randomness.inside():  # as while it learns, so that a step's generators are the run's
            while not self.trainer.done:
                action, _ = self.model.policy.predict(self.env.observation, deterministic=True)
                self.env.forget()
                self.env.step(action)

    def rollout_started(self) -> None:
        """Keep what the rollout will change."""
        model = self.model
        self.model.logger.dump()
        self.env.forget()
        self.rollout = {
            "num_timesteps": model.num_timesteps,
            "episode_num": model._episode_num,
            "last_obs": torch.from_numpy(model._last_obs.copy()),
            "last_episode_starts": torch.from_numpy(model._last_episode_starts.copy()),
            "stored": model.replay_buffer.pos if isinstance(model, OffPolicyAlgorithm) else 0,
            "randomness": global_state(),
            "action_space": model.action_space.np_random.bit_generator.state,
        }

    def save(self, folder: Path) -> None:
        """The policy, its features' statistics and what it was made for: policy.safetensors and policy.json."""
        from safetensors.torch import save_file

        if not is_first():
            return
        with atomic(folder) as temporary:
            temporary.mkdir()
            save_file(self.model.policy.state_dict(), str(temporary / "policy.safetensors"))
            content = {"version": POLICY_VERSION, **purpose(self.method), "features": self.env.features.state_dict()}
            write_json(temporary / "policy.json", content)

    def state_dict(self) -> dict[str, Any]:
        model, rollout = self.model, self.rollout
        state = {
            "trained": self.trained,
            "env": self.env.state_dict(),
            "rollout": rollout,
            "parameters": model.get_parameters(),
            "updates": model._n_updates,
        }
        if isinstance(model, OffPolicyAlgorithm):
            buffer, stored = model.replay_buffer, rollout.get("stored", 0)
            state["stored"] = {name: torch.from_numpy(getattr(buffer, name)[:stored].copy()) for name in REPLAYED}
            if getattr(model, "log_ent_coef", None) is not None:
                state["log_ent_coef"] = model.log_ent_coef.detach().clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model = self.model
        self.trained = state_dict["trained"]
        self.env.load_state_dict(state_dict["env"])
        model.set_parameters(state_dict["parameters"])
        model._n_updates = state_dict["updates"]
        if "log_ent_coef" in state_dict:
            model.log_ent_coef.data.copy_(state_dict["log_ent_coef"])
        self.rollout = rollout = state_dict["rollout"]
        if isinstance(model, OffPolicyAlgorithm) and "stored" in rollout:
            for name in REPLAYED:
                getattr(model.replay_buffer, name)[: rollout["stored"]] = state_dict["stored"][name].numpy()
            model.replay_buffer.pos = rollout["stored"]
        if rollout and not self.trained:
            self.env.replay()
            model.num_timesteps, model._episode_num = rollout["num_timesteps"], rollout["episode_num"]
            model._last_obs = rollout["last_obs"].numpy()
            model._last_episode_starts = rollout["last_episode_starts"].numpy()
            model.action_space.np_random.bit_generator.state = rollout["action_space"]
            self.randomness.kept = rollout["randomness"]


@final
class LambdaPolicy(ActorCriticPolicy):
    """Stable-Baselines3's policy and value networks, with the paper's z ~ N(mu(s), s(s)^2) (2512.01054, appendix C).

    Args:
        state_dependent_std: log s(s) is a further output of mu's network, at its beginning log_std_init for all states;
            false: one parameter, as Stable-Baselines3 has it.
        kl_share: weight of KL(N(mu, s^2) || N(0, 1)) in units of the entropy's: what `evaluate_actions` gives as the
            entropy, of which PPO's loss takes ent_coef, is less by it.
    """

    def __init__(self, *arguments: Any, state_dependent_std: bool, kl_share: float, **options: Any):
        self.state_dependent_std, self.kl_share = state_dependent_std, kl_share  # before `_build`, which asks
        super().__init__(*arguments, **options)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        if self.state_dependent_std:
            self.log_std_net = nn.Linear(self.mlp_extractor.latent_dim_pi, len(self.log_std))
            nn.init.zeros_(self.log_std_net.weight)
            nn.init.constant_(self.log_std_net.bias, self.log_std_init)
            del self.log_std
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        if not self.state_dependent_std:
            return super()._get_action_dist_from_latent(latent_pi)
        return self.action_dist.proba_distribution(self.action_net(latent_pi), self.log_std_net(latent_pi))

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        gaussian = self.action_dist.distribution  # of these states
        return (
            values,
            log_prob,
            entropy - self.kl_share * kl_to_gaussian(gaussian.mean, gaussian.stddev, 0.0, 1.0).sum(1),
        )


def policy_of(method: RLLambda) -> dict[str, Any]:
    """What PPO is given for the policy that the method asks for; nothing where that is Stable-Baselines3's own."""
    if not method.state_dependent_std and not method.kl_weight:
        return {}
    settings = method.agent.keywords
    kl_share = method.kl_weight / settings["ent_coef"] if method.kl_weight else 0.0
    own = {"state_dependent_std": method.state_dependent_std, "kl_share": kl_share}
    return {"policy": LambdaPolicy, "policy_kwargs": (settings.get("policy_kwargs") or {}) | own}


NEWER = {"method.fresh_state": False, "method.state_dependent_std": False}  # of policies from before these options


def purpose(method: RLLambda) -> dict[str, Any]:
    """What a policy is for: it fits another run only if all of this is the same."""
    std = {"method.state_dependent_std": method.state_dependent_std}
    return (std if issubclass(method.agent.func, OnPolicyAlgorithm) else {}) | {
        "method.fresh_state": method.fresh_state,
        "method/agent": method.agent.func.__name__.lower(),
        "method.agent.policy_kwargs": method.agent.keywords.get("policy_kwargs"),
        "method.observe_gradient_norms": method.observe_gradient_norms,
        "method.low": method.low,
        "method.high": method.high,
    }


def load_policy(method: RLLambda) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and features' statistics of `method.policy`, a run folder or its policy/.

    Raises ConfigurationError if there is none, it is damaged, or it was made for something else.
    """
    from safetensors.torch import load_file

    folder = Path(method.policy).expanduser()
    if not (folder / "policy.json").is_file():
        folder = folder / "policy"
    try:
        content = NEWER | json.loads((folder / "policy.json").read_text())
        weights = load_file(folder / "policy.safetensors")
        found = {name: content[name] for name in purpose(method)}
        features = content["features"]
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are no finite numbers")
        if not isinstance(features, dict):
            raise ValueError("its features have no statistics")
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"method.policy={method.policy}: expected a run folder with policy/, or that folder; {error.filename} is "
            "not there."
        ) from error
    except Exception as error:  # whatever a foreign file makes json and safetensors raise
        raise damaged_policy(folder, error) from error
    for name, wanted in purpose(method).items():
        if found[name] != wanted:
            raise ConfigurationError(
                f"method.policy={folder}: it was trained with {name}={found[name]}, this run has {wanted}; give it the "
                "same."
            )
    return weights, features


def damaged_policy(place: str | Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"method.policy={place}: the policy is damaged or not of this runner ({first_line(error)}); train it again."
    )


@final
class Randomness:
    """SB3 draws from Python's, NumPy's and torch's global generators; here it does so without disturbing the run."""

    def __init__(self) -> None:
        self.kept = global_state()  # an SB3 algorithm seeds them when it is made

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The agent's code: its generators are the global ones."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    outside = inside  # the run's code, called from within the agent's: the exchange is its own inverse

    def _swap(self) -> None:
        before = global_state()
        set_global_state(self.kept)
        self.kept = before


def global_state() -> dict[str, Any]:
    """The global generators on the CPU, as a checkpoint can store it."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_global_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@final
class RolloutStart(BaseCallback):
    """Calls a function before each rollout."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def _on_rollout_start(self) -> None:
        self.function()

    def _on_step(self) -> bool:
        return True


@final
class NoteWriter(KVWriter):
    """SB3's own figures of the agent, as agent/..., to the trainer's listeners."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        found = {f"agent/{key}": float(value) for key, value in key_values.items() if not key.startswith("time/")}
        if found:
            self.trainer.note(found)

    def close(self) -> None:
        pass

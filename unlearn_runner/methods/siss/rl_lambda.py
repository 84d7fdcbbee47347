"""RL-lambda: an agent chooses SISS's lambda at every step of the unlearning run (2512.01054, section 5.3, appendix C).

The loss is SISS's. What is here is what the agent is paid; what it sees and does is `drivers/lambda_env.py`, and who
trains it `drivers/sb3.py`.

# Notation (variable -> paper)
# lambd, previous -> lambda_k, lambda_{k-1};  low, high -> lambda_min, lambda_max;  omega -> weight of the smoothness
# loss -> L_SISS = c_x w_x l_x - c_a w_a l_a, means over pixels
# observed -> L_x, L_a, ||g_x||, ||g_a|| of the state s_k
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.denoising import denoising_loss, draw_eps, draw_noise
from unlearn_runner.methods.method import Method, Setting
from unlearn_runner.methods.siss.lambda_controllers import Chosen
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, NonNegativeFloat, OpenUnitInterval, PositiveInt, Seed
from unlearn_runner.rules import method_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, make_generator

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


TERMS = ("loss/retain", "loss/forget", "grad_norm/retain", "grad_norm/forget")
FURTHER_OPTIONS = {"RLLambda": ("unlearn_runner.methods.siss.siss.SISS",)}


def paper_reward(loss: Float[Tensor, ""], lambd: float, previous: float, omega: float) -> Float[Tensor, ""]:
    """-(L_SISS + omega (lambda_k - lambda_{k-1})^2) (2512.01054, section 5.3).

    Not bounded: a destroyed model's forget loss, and so the reward, grows without end. And the expectation of L_SISS
    does not depend on lambda (lambda_objectives.py), so lambda is paid only for what it does to later steps.
    """
    return -(loss + omega * (lambd - previous) ** 2)


def probe_reward(
    losses: Float[Tensor, "2"], losses_base: Float[Tensor, "2"], lambd: float, previous: float, omega: float
) -> Float[Tensor, ""]:
    """Forgetting less damage less omega (lambda_k - lambda_{k-1})^2: in [-2 - omega, 2].

    `losses` are the denoising losses of a fixed batch of retain and of forget images, with the same timesteps and noise
    at every step, and `losses_base` the base model's. Each counts as tanh((l - l_base) / (2 |l_base|)): 0 for the base,
    0.46 for a loss that has doubled, never more than 1. Ours: the paper's reward can be had by breaking the model.
    """
    damage, forgetting = torch.tanh((losses - losses_base) / (2 * losses_base.abs()))
    return forgetting - damage - omega * (lambd - previous) ** 2


@final
class Probe:
    """A few retain and forget images, each at a timestep and noise of its own, always the same.

    Args:
        model: with the base's weights.
        images: `size` of each kind are drawn from them, all where there are fewer of a kind.
        size: images of each kind, >= 1.
        seed: of the images and the noise.
    """

    def __init__(self, model: GenerativeModel, images: Images, size: int, seed: int):
        self.parts = []
        for images_of_kind in (images.retain, images.forget):
            generator = make_generator(seed, "probe")
            rows = torch.randperm(len(images_of_kind), generator=generator)[:size]
            x0, cond = images_of_kind.take(rows)
            # Spread over the whole schedule: the middle of each of b equal ranges.
            middles = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
            noise = make_generator(seed, "probe's noise", x0.device)
            timesteps = (middles * model.num_train_timesteps).long()
            self.parts.append((x0, cond, timesteps, draw_eps(model, x0, noise)))
        self.losses_base = self(model)

    def __call__(self, model: GenerativeModel) -> Float[Tensor, "2"]:
        """Mean denoising loss over pixels of the retain and of the forget images."""
        with torch.no_grad():
            losses = [denoising_loss(model, *part).mean() / model.num_entries for part in self.parts]
        return torch.stack(losses)


@final
class RLLambda(Method):
    """SISS whose lambda an agent sets before each step, and what the agent needs to know about its task.

    Args:
        agent: a Stable-Baselines3 algorithm, called with what `drivers/sb3.py` knows: environment, seed, sizes.
        training: "online": one run, in which the policy learns as it goes (the paper's main set-up); "episodic": the
            policy learns in `episodes` runs that each start from the base again, with images and noise of their own,
            then one run with its mean action.
        policy: a run folder, or its policy/: take this policy, learn nothing.
        low, high: the range of lambda, inside (0, 1).
        reward: "paper" or "probe"; see their functions.
        omega: weight of the squared change of lambda, >= 0.
        observe_gradient_norms: the agent sees ||g_x|| and ||g_a||; false is the paper's ablation.
        fresh_state: true: the losses and norms that the agent sees are those of the weights after the step, as the
            paper's state s_k belongs to the weights that lambda_k is for: found anew on the step's images, at timesteps
            and noise of their own, each term apart and without weights (two forward passes a step, and as many backward
            for the norms). False: those that the step itself found, under the weights before it.
        state_dependent_std: PPO's standard deviation comes from the state, as in the paper's N(mu(s), s(s)^2); false:
            one for all states, Stable-Baselines3's. SAC's always comes from the state.
        kl_weight: of KL(pi(.|s) || N(0, 1)) of the logit in PPO's loss, >= 0.
        update_every: steps between two updates of an on-policy agent's policy, online.
        episodes: to train for, episodic.
        episodes_per_update: of an on-policy agent's policy, episodic.
        probe_size: retain images, and as many forget images, of the probe, drawn once and seen after every step.
        lambd: what the agent sees as lambda before the first step.
        siss: the other settings of SISS.

    The defaults of fresh_state and state_dependent_std are those of run folders that do not name them; the YAML has the
    paper's.
    """

    requires = ("images",)

    def __init__(
        self,
        setting: Setting,
        agent: Callable[..., "BaseAlgorithm"],
        training: Literal["online", "episodic"] = "online",
        policy: str | None = None,
        low: OpenUnitInterval = 0.01,
        high: OpenUnitInterval = 0.99,
        reward: Literal["paper", "probe"] = "paper",
        omega: NonNegativeFloat = 0.1,
        observe_gradient_norms: bool = True,
        fresh_state: bool = False,
        state_dependent_std: bool = False,
        kl_weight: NonNegativeFloat = 0.0,
        update_every: PositiveInt = 25,
        episodes: PositiveInt = 8,
        episodes_per_update: PositiveInt = 2,
        probe_size: BatchSize = 16,
        seed: Seed = 0,
        lambd: OpenUnitInterval = 0.5,
        **siss: Any,
    ):
        method_options.range_of_lambda(low, high, lambd)
        self.agent = agent
        self.training = training
        self.policy = policy
        self.low, self.high = float(low), float(high)
        self.omega = omega
        self.observe_gradient_norms = observe_gradient_norms
        self.fresh_state = fresh_state
        self.state_dependent_std, self.kl_weight = state_dependent_std, kl_weight
        self.state_generator = make_generator(seed, "state", setting.generator.device)
        self.update_every = update_every
        self.episodes, self.episodes_per_update = episodes, episodes_per_update
        self.seed = seed
        self.initial = float(lambd)
        self.lambd = Chosen(self.initial)
        self.siss = SISS(setting, lambd=self.lambd, **siss)
        self.reward, self.probe_size = reward, probe_size
        self.probe: Probe | None = None  # since `begin`, where the reward asks for it
        self.reads = self.siss.reads
        self.networks = self.siss.networks

    @property
    def model(self) -> GenerativeModel:
        return self.siss.model

    @property
    def rehearsals(self) -> int:
        """How many runs are made before the one that counts."""
        return self.episodes if self.training == "episodic" and self.policy is None else 0

    @property
    def observed(self) -> tuple[str, ...]:
        """The metrics of a step that are part of the next state, in its order."""
        terms = TERMS if self.observe_gradient_norms else TERMS[:2]
        return tuple(f"agent/{term.replace('/', '_')}" for term in terms) if self.fresh_state else terms

    def begin(self, images: Images | None) -> None:
        self.siss.begin(images)
        if self.reward == "probe":
            self.probe = Probe(self.siss.trained, images, self.probe_size, self.seed)

    def step(self, batch: Batch) -> Metrics:
        # 1. one step of SISS with the agent's lambda
        metrics = self.siss.step(batch)

        # 2. what the new weights' state is
        if self.fresh_state:
            timesteps, eps = draw_noise(self.siss.trained, batch.x0_retain, self.state_generator)
            terms = self.siss.separate_terms(batch, timesteps, eps, norms=self.observe_gradient_norms)
            metrics |= zip(self.observed, terms.of_batch(), strict=True)

        # 3. the reward
        lambd, previous = self.lambd.value, self.lambd.previous
        if self.probe is None:
            c_retain, c_forget = self.siss.factors(batch)
            loss = c_retain * metrics["loss/retain"] - c_forget * metrics["loss/forget"]
            return metrics | {"agent/reward": paper_reward(loss, lambd, previous, self.omega)}
        losses = self.probe(self.siss.trained)
        return metrics | {
            "agent/reward": probe_reward(losses, self.probe.losses_base, lambd, previous, self.omega),
            "probe/retain": losses[0],
            "probe/forget": losses[1],
        }

    def stateful(self) -> dict[str, Stateful]:
        parts = self.siss.stateful()
        if self.fresh_state:
            parts["state"] = GeneratorState(self.state_generator)
        return parts

"""Critic-guided reinforcement unlearning (2601.03213), and DDPO (2305.13301), which is the same without a critic.

DDPO as in its released code (github.com/kvablack/ddpo-pytorch): the log-prob as a mean over a latent's entries, the
clip range on it, statistics of each prompt's rewards, advantages cut to 5, guidance also while training. Not as there:
an update has steps of many roll-outs, not all steps of a few; prompts of both kinds come equally often instead of at
random; the last step leads to the picture and has no density, where the code stops at t = 0 with a small deviation;
rates, LoRA and batches are the configuration's.

# Notation (variable -> paper), besides rollouts.py's
# behaviour -> the policy that a roll-out was drawn by
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unlearn_runner.data.streams import Images
from unlearn_runner.distributed import in_shares
from unlearn_runner.errors import NonFiniteError
from unlearn_runner.methods.method import Counter, Method, Setting, Update, copy_weights
from unlearn_runner.methods.policy.rollouts import (
    Memory,
    Move,
    PromptStatistics,
    Reward,
    Rollouts,
    generalised_advantages,
    move,
    policy_loss,
)
from unlearn_runner.methods.siss.passes import effective_sample_size
from unlearn_runner.models.critic import Critic
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, evaluating
from unlearn_runner.models.path import ladder
from unlearn_runner.options import (
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitInterval,
)
from unlearn_runner.rules import method_options, model_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


@final
class CriticGuided(Method):
    """A round is a step: roll out, reward, advantages, clipped updates of the policy, update of the critic.

    Args:
        critic_update: called with the critic; None: no critic, every step has its roll-out's advantage (DDPO).
        num_rollouts: pictures in a round, `forget_share` of them under forget prompts.
        num_inference_steps, eta: of the roll-outs' DDIM.
        timestep_share: of a roll-out's steps that are learnt from, drawn anew for each.
        minibatches: updates in a round, each from another part of it.
        microbatch: steps passed through the network at once.
        clip_range: of the ratio of two log-probs divided by the number of entries of x, as DDPO's code has it.
        max_advantage: advantages are cut to it.
        min_std: rewards of one prompt that vary less are divided by this. (DDPO's code adds 1e-6 instead.)
        trace: see `generalised_advantages`.
        critic_sees: "noisy": x_t of every step, and t; "clean": the ablation that learns from pictures alone.
        critic_steps, critic_batch: updates of the critic in a round, and states in each.
        critic_warmup: rounds in which the critic alone learns.
        reuse: earlier rounds learnt from besides the own one, at most `max_staleness` rounds old, each step with the
            importance weight pi_start / pi_behaviour, at most `max_weight`. The weight corrects for the choice of the
            action, not for how often the state is met.
        kl_weight: of KL(pi_theta || pi_base) of each step under `kl_prompts`, "retain" or "all", divided by the number
            of entries.
        history, least_history, other_history: size, least and others of `PromptStatistics`.
        reward, temperature, override: see `Reward`.
    """

    requires = ("noise", "labels", "clip", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[nn.Module], Update],
        critic_update: Callable[[nn.Module], Update] | None = None,
        num_rollouts: BatchSize = 32,
        forget_share: Annotated[float, Gt(0), Le(1)] = 0.5,
        num_inference_steps: Annotated[int, Ge(2), Le(100_000)] = 10,
        eta: Annotated[float, Gt(0), Le(1)] = 1.0,
        timestep_share: Annotated[float, Gt(0), Le(1)] = 1.0,
        minibatches: PositiveInt = 4,
        microbatch: BatchSize = 64,
        clip_range: PositiveFloat = 1e-4,
        max_advantage: PositiveFloat = 5.0,
        min_std: PositiveFloat = 0.005,
        trace: UnitInterval = 0.9,
        critic_sees: Literal["noisy", "clean"] = "noisy",
        critic_steps: PositiveInt = 8,
        critic_batch: BatchSize = 64,
        critic_warmup: NonNegativeInt = 1,
        reuse: NonNegativeInt = 1,
        max_staleness: PositiveInt = 2,
        max_weight: PositiveFloat = 2.0,
        kl_weight: NonNegativeFloat = 0.0,
        kl_prompts: Literal["retain", "all"] = "retain",
        history: Annotated[int, Gt(0), Le(100_000)] = 32,
        least_history: PositiveInt = 8,
        other_history: Literal["kind", "round"] = "kind",
        reward: Literal["similarity", "probability"] = "similarity",
        temperature: PositiveFloat | None = None,
        override: str | None = None,
        seed: Seed = 0,
    ):
        model, labels, clip = setting.model, setting.labels, setting.clip
        model_options.require_steps(num_inference_steps, model.num_train_timesteps, "method.num_inference_steps")
        method_options.prompts_of_both_kinds(forget_share, num_rollouts)
        method_options.history_of_rewards(history, least_history)
        method_options.enough_steps_to_learn_from(minibatches, num_rollouts, timestep_share, num_inference_steps)
        self.reads = Streams(retain=None, forget=False)
        self.trained, self.clip, self.labels = model, clip, labels
        self.reward = Reward(clip, labels, reward, override, temperature)
        self.kinds = torch.isin(torch.arange(len(labels.names)), torch.tensor(labels.forget))
        self.num_rollouts, self.num_forget = num_rollouts, round(forget_share * num_rollouts)
        self.times = ladder(model.num_train_timesteps, num_inference_steps)
        self.eta, self.timestep_share = eta, timestep_share
        self.minibatches, self.microbatch = minibatches, microbatch
        self.clip_range, self.max_advantage, self.min_std, self.trace = clip_range, max_advantage, min_std, trace
        self.critic_sees, self.critic_steps, self.critic_batch = critic_sees, critic_steps, critic_batch
        self.critic_warmup = 0 if critic_update is None else critic_warmup
        self.reuse, self.max_weight = reuse, max_weight
        self.kl_weight, self.kl_prompts = kl_weight, kl_prompts
        self.statistics = PromptStatistics(len(labels.names), history, least_history, other_history)
        self.memory = Memory(max_staleness)
        self.update = update(model)
        self.base = copy.deepcopy(model).requires_grad_(False) if kl_weight else None
        self.critic = self.critic_update = None
        if critic_update is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
                self.critic = Critic(clip, model.sample_shape[0]).to(next(model.parameters()).device)
            self.critic_update = critic_update(self.critic)
        self.networks = (model,) if self.base is None else (model, self.base)
        self.generator = setting.generator
        self.rounds = Counter()

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        if self.critic is not None:
            copy_weights(self.critic.tower, self.clip.visual)
        if self.base is not None:
            copy_weights(self.base, self.trained)

    def step(self, batch: Batch) -> Metrics:
        # 1. roll out under forget and retain prompts, and let CLIP judge the pictures
        rollouts = self.roll_out(self._draw_labels())
        if not bool(rollouts.rewards.isfinite().all()):
            raise NonFiniteError(f"the reward became {rollouts.rewards.sum().item()} in round {self.rounds.value + 1}")
        self.statistics.add(rollouts.labels, rollouts.rewards)

        # 2. advantages of its steps and of those of earlier rounds, in the critic's eyes of today
        parts = [rollouts, *self.memory.before(self.rounds.value, self.reuse)]
        advantages = [self.advantages(part) for part in parts]

        # 3. clipped updates of the policy
        metrics = {}
        if self.rounds.value >= self.critic_warmup:
            metrics |= self._improve(parts, advantages)

        # 4. the critic learns what became of the states
        if self.critic is not None:
            metrics |= self._teach_critic(rollouts)

        if self.reuse:
            self.memory.add(self.rounds.value, rollouts)
        self.rounds.value += 1
        forget = self.reward.to_forget(rollouts.labels)
        for name, rows in (("forget", forget), ("retain", ~forget)):
            if rows.any():
                metrics[f"reward/{name}"] = rollouts.rewards[rows].mean()
        return metrics | {"reward/mean": rollouts.rewards.mean()}

    @torch.no_grad()
    def roll_out(self, labels: Int64[Tensor, "b"]) -> Rollouts:
        """Pictures under these labels, drawn by the policy of now."""
        model, b = self.trained, len(labels)
        x = torch.randn((b, *model.sample_shape), generator=self.generator, device=labels.device)
        states, log_probs = [x], []
        with evaluating(model):
            for t, t_next in pairwise(self.times):
                noise = torch.randn(x.shape, generator=self.generator, device=x.device)
                moves = [
                    move(model, *(part[rows] for part in (x, self._at(t, b), self._at(t_next, b), labels)),
                         noise=noise[rows], eta=self.eta)
                    for rows in self._microbatches(b)
                ]  # fmt: skip
                x = torch.cat([part.action for part in moves])
                states.append(x)
                log_probs.append(torch.cat([part.log_prob for part in moves]))
            parts = [(model.picture(x[rows]), labels[rows]) for rows in self._microbatches(b)]
            rewards = torch.cat([in_shares(self.reward, *part) for part in parts])
        return Rollouts(labels, torch.stack(states, dim=1), torch.stack(log_probs, dim=1), rewards)

    def score(
        self, model: DiffusionModel, rollouts: Rollouts, rows: Int64[Tensor, "n"], steps: Int64[Tensor, "n"]
    ) -> Move:
        """The steps that were taken, as `model` sees them."""
        times = self.times.to(rows.device)
        with evaluating(model):
            return move(
                model,
                rollouts.states[rows, steps],
                times[steps],
                times[steps + 1],
                rollouts.labels[rows],
                action=rollouts.states[rows, steps + 1],
                eta=self.eta,
            )

    @torch.no_grad()
    def values(self, rollouts: Rollouts) -> Float[Tensor, "b k"]:
        """What the critic expects at each step."""
        k = rollouts.log_probs.shape[1]
        states = rollouts.states[:, :k].flatten(0, 1)
        levels = self._levels(torch.arange(k, device=states.device)).repeat(len(rollouts.labels))
        texts = self.reward.texts[rollouts.labels].repeat_interleave(k, dim=0)
        inputs = [[part[rows] for part in (states, levels, texts)] for rows in self._microbatches(len(states))]
        found = [in_shares(self.critic, *part) for part in inputs]
        return torch.cat(found).view(-1, k)

    def advantages(self, rollouts: Rollouts) -> Float[Tensor, "b k"]:
        """Of each step, in standard deviations of its prompt's rewards."""
        mean, std = self.statistics.of(rollouts.labels, self.kinds)
        std = std.clamp(min=self.min_std)
        if self.critic is None:
            found = (rollouts.rewards - mean)[:, None].expand(-1, rollouts.log_probs.shape[1])
        else:
            found = generalised_advantages(self.values(rollouts), rollouts.rewards, self.trace)
        return (found / std[:, None]).clamp(-self.max_advantage, self.max_advantage)

    def _improve(self, parts: list[Rollouts], advantages: list[Float[Tensor, "b k"]]) -> Metrics:
        """Some updates by PPO's surrogate, each from another part of all steps."""
        joined = Rollouts(*(torch.cat(field) for field in zip(*parts, strict=True)))
        advantages = torch.cat(advantages)
        rows, steps = self._chosen_steps(joined)
        fresh = len(parts[0].labels)

        # the policy at the beginning: of fresh roll-outs it is the one that drew them
        start = joined.log_probs.clone()
        with torch.no_grad():
            earlier = torch.nonzero(rows >= fresh)[:, 0]
            for part in (earlier[chunk] for chunk in self._microbatches(len(earlier))):
                start[rows[part], steps[part]] = self.score(self.trained, joined, rows[part], steps[part]).log_prob
        weights = (start - joined.log_probs).exp().clamp(max=self.max_weight)

        entries = self.trained.num_entries
        sums = {name: start.new_zeros(()) for name in ("loss/policy", "policy/clipped", "loss/kl")}
        mean, squares = 0.0, 0.0
        for chunk in torch.arange(len(rows), device=rows.device).tensor_split(self.minibatches):
            gradient = self.update.zero_gradient()
            for part in chunk.split(self.microbatch):
                r, k = rows[part], steps[part]
                share = len(part) / len(chunk)
                scored = self.score(self.trained, joined, r, k)
                log_ratio = (scored.log_prob - start[r, k]) / entries
                loss = policy_loss(log_ratio, advantages[r, k], weights[r, k], self.clip_range)
                sums["loss/policy"] += loss.detach() * share
                if self.base is not None:
                    kl = self._divergence(scored, joined, r, k)
                    sums["loss/kl"] += kl.detach() * share
                    loss = loss + self.kl_weight * kl
                gradient = gradient + self.update.gradient(loss) * share
                log_ratio = log_ratio.detach()
                sums["policy/clipped"] += ((log_ratio.exp() - 1).abs() > self.clip_range).float().mean() * share
            self.update.apply(gradient)
            mean = mean + gradient / self.minibatches
            squares = squares + gradient.square().sum() / self.minibatches
        found = {name: total / self.minibatches for name, total in sums.items()}
        if self.base is None:
            del found["loss/kl"]
        found["grad_norm/policy"] = mean.norm()
        if self.minibatches > 1:  # of one minibatch's gradient; the policy hardly changes within a round
            found["grad_variance/policy"] = (squares - mean.square().sum()) * self.minibatches / (self.minibatches - 1)
        reused = rows >= fresh
        if reused.any():
            found["weights/ess_reuse"] = effective_sample_size(weights[rows[reused], steps[reused]])
        return found

    def _divergence(
        self, scored: Move, rollouts: Rollouts, rows: Int64[Tensor, "n"], steps: Int64[Tensor, "n"]
    ) -> Float[Tensor, ""]:
        """KL(pi_theta || pi_base) in nats an entry of x, mean over all these steps; 0 where it does not apply."""
        held = ~self.reward.to_forget(rollouts.labels[rows]) | (self.kl_prompts == "all")
        if not held.any():
            return scored.mean.new_zeros(())
        with torch.no_grad():
            base = self.score(self.base, rollouts, rows[held], steps[held])
        apart = (scored.mean[held] - base.mean) / scored.std[held]
        return apart.square().flatten(1).mean(1).sum() / 2 / len(rows)

    def _teach_critic(self, rollouts: Rollouts) -> Metrics:
        """Squared error of the terminal reward at states of this round's roll-outs, all steps equally often."""
        b, k = rollouts.log_probs.shape
        device = rollouts.rewards.device
        losses = []
        for _ in range(self.critic_steps):
            rows = torch.randint(b, (self.critic_batch,), generator=self.generator, device=device)
            steps = torch.randint(k + 1, (self.critic_batch,), generator=self.generator, device=device)
            if self.critic_sees == "clean":
                steps = torch.full_like(steps, k)
            texts = self.reward.texts[rollouts.labels[rows]]
            found = in_shares(self.critic, rollouts.states[rows, steps], self._levels(steps), texts)
            loss = (found - rollouts.rewards[rows]).square().mean()
            self.critic_update.apply(self.critic_update.gradient(loss))
            losses.append(loss.detach())
        return {"loss/critic": torch.stack(losses).mean()}

    def _draw_labels(self) -> Int64[Tensor, "b"]:
        """Each prompt of a kind as often as the others up to one; which are more often is drawn."""
        device = self.generator.device
        drawn = []
        for labels, count in (
            (self.labels.forget, self.num_forget),
            (self.labels.retain, self.num_rollouts - self.num_forget),
        ):
            order = torch.randperm(len(labels), generator=self.generator, device=device)
            drawn.append(torch.tensor(labels, device=device)[order[torch.arange(count, device=device) % len(labels)]])
        return torch.cat(drawn)

    def _chosen_steps(self, rollouts: Rollouts) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """Which steps of which roll-outs to learn from, in random order."""
        b, k = len(rollouts.labels), rollouts.num_actions
        kept = self._kept(self.timestep_share, k)
        device = self.generator.device
        steps = torch.rand((b, k), generator=self.generator, device=device).argsort(1)[:, :kept].flatten()
        rows = torch.arange(b, device=device).repeat_interleave(kept)
        order = torch.randperm(b * kept, generator=self.generator, device=device)
        return rows[order], steps[order]

    @staticmethod
    def _kept(timestep_share: float, num_actions: int) -> int:
        """How many steps of a roll-out are learnt from."""
        return max(1, round(timestep_share * num_actions))

    def _levels(self, steps: Int64[Tensor, "n"]) -> Float[Tensor, "n"]:
        """(t + 1) / T at these steps, 0 of a picture; always 0 for a critic that knows pictures only."""
        levels = ((self.times + 1) / self.trained.num_train_timesteps).to(steps.device)[steps]
        return torch.zeros_like(levels) if self.critic_sees == "clean" else levels

    def _microbatches(self, count: int) -> list[slice]:
        return [slice(start, start + self.microbatch) for start in range(0, count, self.microbatch)]

    def _at(self, t: Int64[Tensor, ""], b: int) -> Int64[Tensor, "{b}"]:
        return t.to(self.generator.device).expand(b)

    def stateful(self) -> dict[str, Stateful]:
        parts = {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "statistics": self.statistics,
            "memory": self.memory,
            "rounds": self.rounds,
        }
        if self.critic is not None:
            parts |= {f"critic_{name}": part for name, part in self.critic_update.stateful().items()}
        return parts

"""The reverse process as a policy: its roll-outs, their rewards, and what a step learns from them.

# Notation (variable -> 2601.03213, 2305.13301)
# states[:, k], actions -> s_k = (c, t_k, x_k), a_k = x_{k+1}: denoising from t_k to t_{k+1};  reward -> r(x_0, c)
# ratio -> pi_theta(a|s) / pi_start(a|s), start being the policy at the beginning of a round
"""

from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.spec import Labels


def policy_loss(
    log_ratio: Float[Tensor, "n"],
    advantages: Float[Tensor, "n"],
    weights: Float[Tensor, "n"],
    clip_range: float,
) -> Float[Tensor, ""]:
    """-mean w min(ratio A, clip(ratio, 1 - c, 1 + c) A): PPO's surrogate (1707.06347, equation 7), to descend.

    At ratio 1 its gradient is the policy gradient, -mean w A grad log pi. `weights` correct for actions that an older
    policy chose.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).mean()


def generalised_advantages(
    values: Float[Tensor, "b k"], rewards: Float[Tensor, "b"], trace: float
) -> Float[Tensor, "b k"]:
    """Of each step, sum_l trace^l (V_{k+l+1} - V_{k+l}), V after the last step being the reward (1506.02438, gamma 1).

    trace 1: r - V_k, the critic as a baseline only; trace 0: V_{k+1} - V_k, the step's own part in the critic's eyes.
    """
    gains = torch.cat([values[:, 1:], rewards[:, None]], dim=1) - values
    found, advantages = torch.zeros_like(rewards), []
    for k in reversed(range(values.shape[1])):
        found = gains[:, k] + trace * found
        advantages.append(found)
    return torch.stack(advantages[::-1], dim=1)


class Move(NamedTuple):
    """One step of the policy: a Gaussian over what follows x_t, what was taken, and its log-density."""

    action: Float[Tensor, "b c h w"]
    log_prob: Float[Tensor, "b"]  # summed over the entries of x
    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b 1 1 1"]


def move(
    model: DiffusionModel,
    x_t: Float[Tensor, "b c h w"],
    t: Int64[Tensor, "b"],
    t_next: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."] | None,
    action: Float[Tensor, "b c h w"] | None = None,
    noise: Float[Tensor, "b c h w"] | None = None,
    eta: float = 1.0,
) -> Move:
    """The path's step from t to t_next by the guided prediction, taken with `noise` or scored for a known `action`.

    Where t_next is -1 the picture is done: the action is the mean, x0_pred, whatever the noise, and has no density; its
    log_prob is 0.
    """
    policy = model.path.step(x_t, model.guided(x_t, t, cond), t, t_next, eta)
    if action is None:
        action = policy.sample(noise)
    return Move(action, policy.log_prob(action), *policy)


class Rollouts(NamedTuple):
    """What was drawn, from noise to picture."""

    labels: Int64[Tensor, "b"]
    states: Float[Tensor, "b times c h w"]  # the last one is x_0
    log_probs: Float[Tensor, "b k"]  # of each step under the policy that took it; the last step has none and is 0
    rewards: Float[Tensor, "b"]

    @property
    def num_actions(self) -> int:
        """Steps that have a density."""
        return self.log_probs.shape[1] - 1


@final
class Reward:
    """What CLIP says of a picture, in [0, 1]: on retain prompts how well it shows what was asked for, on forget prompts
    how little.

    "probability": CLIP's zero-shot probability of a content, summed over all prompts that ask for it, at `temperature`
    (null: CLIP's own); "similarity": (1 + cosine of picture and prompt) / 2. With an `override`, a text, forget prompts
    are rewarded for showing that. Where several contents are to be forgotten, a picture under a forget prompt may show
    none of them: probabilities are those of any of them, and of the similarities to the prompt and to the forget
    prompts of other contents the largest counts.
    """

    def __init__(
        self,
        clip: Clip,
        labels: Labels,
        kind: Literal["probability", "similarity"] = "similarity",
        override: str | None = None,
        temperature: float | None = None,
    ):
        self.clip, self.kind, self.override, self.temperature = clip, kind, override, temperature
        self.labels = labels
        self._texts: Tensor | None = None

    @property
    def texts(self) -> Float[Tensor, "n d"]:
        """CLIP's embeddings of all prompts and of the override, computed once."""
        if self._texts is None:
            with torch.no_grad():
                more = () if self.override is None else (self.override,)
                self._texts = self.clip.of_texts((*self.labels.names, *more))
        return self._texts

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, "b"]) -> Float[Tensor, "b"]:
        cosines = self.clip.of_images(images) @ self.texts.T
        to_forget = self.to_forget(labels)
        n = len(self.labels.names)
        contents = torch.tensor(self.labels.contents, device=labels.device)
        same = contents[labels][:, None] == contents[None]
        forgets = self.to_forget(torch.arange(n, device=labels.device))
        among = to_forget[:, None] & forgets  # on one of several contents none of the others may take its place
        if self.kind == "similarity":
            own = cosines[torch.arange(len(labels)), labels]
            others = cosines[:, :n].masked_fill(~among | same, -torch.inf).amax(1)
            asked, replacement = (1 + torch.maximum(own, others)) / 2, (1 + cosines[:, -1]) / 2
        else:
            scale = self.clip.scale if self.temperature is None else 1 / self.temperature
            chances = (scale * cosines).softmax(1)
            asked, replacement = (chances[:, :n] * (same | among)).sum(1), chances[:, -1]
        forgot = 1 - asked if self.override is None else replacement
        return torch.where(to_forget, forgot, asked)

    def to_forget(self, labels: Int64[Tensor, "b"]) -> Bool[Tensor, "b"]:
        return torch.isin(labels, torch.tensor(self.labels.forget, device=labels.device))


@final
class PromptStatistics:
    """Mean and standard deviation of each prompt's `size` newest rewards, those just added among them; stateful.

    Until a prompt has `least` of them, others stand for its own: "round", all that were added last, whatever their
    prompts, as in DDPO's code; "kind", those kept of all prompts of its kind, to forget or to retain.
    """

    def __init__(self, num_labels: int, size: int, least: int, others: Literal["kind", "round"] = "kind"):
        self.size, self.least, self.others = size, least, others
        self.rewards = torch.full((num_labels, size), torch.inf)  # where there is none yet
        self.newest = torch.empty(0)  # of the round, which begins with `add`: no checkpoint falls in between

    def add(self, labels: Int64[Tensor, "b"], rewards: Float[Tensor, "b"]) -> None:
        self.newest = rewards.cpu()
        for label, reward in zip(labels.tolist(), rewards.cpu(), strict=True):
            self.rewards[label] = torch.cat([self.rewards[label, 1:], reward[None]])

    def of(
        self, labels: Int64[Tensor, "b"], kinds: Bool[Tensor, "labels"]
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        means, stds = torch.zeros(2, len(self.rewards))
        for label in labels.unique().tolist():
            own = self.rewards[label]
            if own.isfinite().sum() < self.least:
                own = self.newest if self.others == "round" else self.rewards[kinds == kinds[label]]
            known = own[own.isfinite()]
            means[label], stds[label] = known.mean(), known.std(correction=0)
        return means[labels.cpu()].to(labels.device), stds[labels.cpu()].to(labels.device)

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": self.rewards.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rewards = state_dict["rewards"].cpu().clone()


@final
class Memory:
    """The newest roll-outs with the round each was drawn in, none older than `max_staleness` rounds; stateful."""

    def __init__(self, max_staleness: int):
        self.max_staleness = max_staleness
        self.kept: list[tuple[int, Rollouts]] = []

    def add(self, number: int, rollouts: Rollouts) -> None:
        self.kept = [(drawn, part) for drawn, part in self.kept if number - drawn < self.max_staleness]
        self.kept.append((number, rollouts))

    def before(self, number: int, count: int) -> list[Rollouts]:
        """The `count` newest of earlier rounds, as far as they are fresh enough."""
        fresh = [part for drawn, part in self.kept if drawn < number <= drawn + self.max_staleness]
        return fresh[-count:] if count else []

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [(number, tuple(part)) for number, part in self.kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [(number, Rollouts(*part)) for number, part in state_dict["kept"]]

"""EraseFlow (NeurIPS 2025, 2511.00804): roll-outs of an anchor prompt get the same flow under the forget prompt, by the
trajectory balance of generative flow networks (2201.13259).

Released code (github.com/Abhiramkns/EraseFlow): roll-outs are drawn by the network of now, in the first 21 steps of
training alone; a fifth of the sampling steps, the last, count in each, and as many others at random; log-densities are
means over a latent's entries; log beta 2.5; log Z begins at -0.1953; LoRA of rank 4, AdamW, 3e-4, one roll-out of 50
steps with guidance 5. There the last step stops at t = 0 and counts; here it leads to the picture, has no density and
does not count.

# Notation (variable -> paper)
# forward, backward -> P_F(x_{t-1} | x_t, c), P_B(x_t | x_{t-1}) = q(x_t | x_{t-1})
# log_partition -> log Z_phi;  log_reward -> log beta, the same of every roll-out under the anchor
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.distillation.overrides import drawn_labels
from unlearn_runner.methods.method import Counter, Method, Setting, Update
from unlearn_runner.methods.policy.rollouts import move
from unlearn_runner.models.model import GenerativeModel, evaluating
from unlearn_runner.models.path import Gaussian, ladder
from unlearn_runner.options import BatchSize, NonNegativeInt, UnitInterval
from unlearn_runner.rules import model_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def imbalance(
    forward: Float[Tensor, "b k"], backward: Float[Tensor, "b k"], log_partition: Float[Tensor, ""], log_reward: float
) -> Float[Tensor, "b"]:
    """log Z + sum log P_F - log R - sum log P_B of each roll-out, whose square is to descend (trajectory balance,
    2201.13259, equation 14; 2511.00804, section 4).
    """
    return (forward - backward).sum(1) + log_partition - log_reward


class LogPartition(nn.Module):
    """log Z, which is learnt with the network."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))


@final
class Trajectories:
    """The newest roll-outs. Stateful."""

    def __init__(self) -> None:
        self.states: Float[Tensor, "b times c h w"] | None = None

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"states": self.states}

    def load_state_dict(self, state_dict: dict[str, Tensor | None]) -> None:
        self.states = state_dict["states"]


@final
class EraseFlow(Method):
    """No reward model and no image: whatever the anchor draws is worth the same, and the forget prompt is to draw it.

    Args:
        partition_update: called with log Z.
        anchor: the text whose roll-outs the forget prompts are to have.
        num_rollouts: in a step, under the model's guidance.
        num_inference_steps, eta: of the roll-outs' DDIM.
        fresh_steps: how many steps draw their own roll-outs; later ones learn from the last of these again.
        late_share: of the sampling steps that count always, those with the least noise; as many others count, drawn
            anew in every step.
        log_reward: log beta.
        log_partition: log Z at the beginning.
    """

    requires = ("noise", "prompts", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        partition_update: Callable[[nn.Module], Update],
        anchor: str = "",
        num_rollouts: BatchSize = 8,
        num_inference_steps: Annotated[int, Ge(2), Le(100_000)] = 50,
        eta: Annotated[float, Gt(0), Le(1)] = 1.0,
        fresh_steps: NonNegativeInt = 21,
        late_share: UnitInterval = 0.2,
        log_reward: float = 2.5,
        log_partition: float = -0.1953,
    ):
        model = setting.model
        model_options.require_steps(num_inference_steps, model.num_train_timesteps, "method.num_inference_steps")
        self.reads = Streams(retain=None, forget=False)
        self.networks = (model,)
        self.trained, self.labels = model, setting.labels
        self.anchor, self.num_rollouts, self.eta = anchor, num_rollouts, eta
        self.times = ladder(model.num_train_timesteps, num_inference_steps)
        self.fresh_steps, self.log_reward = fresh_steps, log_reward
        self.num_late = max(1, round(late_share * num_inference_steps))
        self.partition = LogPartition(log_partition).to(next(model.parameters()).device)
        self.update, self.partition_update = update(model), partition_update(self.partition)
        self.trajectories, self.taken = Trajectories(), Counter()
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    @torch.no_grad()
    def begin(self, images: Images | None) -> None:
        self.condition = self.trained.embed([self.anchor]).expand(self.num_rollouts, -1, -1)

    def step(self, batch: Batch) -> Metrics:
        # 1. roll-outs under the anchor
        if self.taken.value < self.fresh_steps or self.trajectories.states is None:
            self.trajectories.states = self._roll_out()
        self.taken.value += 1

        # 2. some of their steps, as they go under a forget prompt, and as they are noised
        forward, backward = self._densities(self.trajectories.states, self._chosen_steps())

        # 3. the squared imbalance, and the updates of the network and of log Z
        found = imbalance(forward, backward, self.partition.value[0].detach(), self.log_reward)
        loss = found.square().mean()
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        self.partition_update.apply(2 * found.detach().mean()[None])
        return {
            "loss/balance": loss.detach(),
            "flow/log_partition": self.partition.value[0].detach().clone(),
            "grad_norm/update": gradient.norm(),
        }

    @torch.no_grad()
    def _roll_out(self) -> Float[Tensor, "b times c h w"]:
        """From noise to what the last step but one leads to."""
        model, g, b = self.trained, self.generator, self.num_rollouts
        x = torch.randn((b, *model.sample_shape), generator=g, device=g.device)
        states = [x]
        with evaluating(model):
            for t, t_next in pairwise(self.times[:-1].to(g.device)):
                noise = torch.randn(x.shape, generator=g, device=x.device)
                x = move(model, x, t.expand(b), t_next.expand(b), self.condition, noise=noise, eta=self.eta).action
                states.append(x)
        return torch.stack(states, dim=1)

    def _chosen_steps(self) -> Int64[Tensor, "k"]:
        """Of the steps with a density: the last ones, and as many of the others."""
        g, count = self.generator, len(self.times) - 2
        late = min(self.num_late, count)
        others = torch.randperm(count - late, generator=g, device=g.device)[:late]
        return torch.cat([others, torch.arange(count - late, count, device=g.device)])

    def _densities(
        self, states: Float[Tensor, "b times c h w"], steps: Int64[Tensor, "k"]
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """log P_F under a forget prompt and log P_B of these steps, means over the entries."""
        model, g, b, k = self.trained, self.generator, len(states), len(steps)
        labels = drawn_labels(self.labels.forget, b, g, g.device).repeat_interleave(k)
        before, after = (states[:, part].flatten(0, 1) for part in (steps, steps + 1))
        t, t_next = (self.times.to(g.device)[part].repeat(b) for part in (steps, steps + 1))
        with evaluating(model):
            forward = move(model, before, t, t_next, labels, action=after, eta=self.eta).log_prob
        ratio, added = model.path.transition(t_next, t)
        backward = Gaussian(ratio * after, added.sqrt()).log_prob(before)
        return forward.view(b, k) / model.num_entries, backward.view(b, k) / model.num_entries

    def stateful(self) -> dict[str, Stateful]:
        return {
            **self.update.stateful(),
            **{f"partition_{name}": part for name, part in self.partition_update.stateful().items()},
            "noise": GeneratorState(self.generator),
            "trajectories": self.trajectories,
            "steps": self.taken,
        }

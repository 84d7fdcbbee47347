"""Score Forgetting Distillation (ICLR 2025, 2409.11219): a one-step generator that never learns what is forgotten."""

from collections.abc import Callable
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Le, Lt

from unlearn_runner.methods.distillation.networks import (
    Distillation,
    Drawn,
    LabelSampler,
    NoiseRange,
    distil_steps,
    split_losses,
)
from unlearn_runner.methods.distillation.overrides import Override, OverrideBatch
from unlearn_runner.methods.method import Counter, Setting, Update, copy_weights
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, PositiveFloat, PositiveInt, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, Metrics, Stateful


def two_stage_rate(
    optimizer: torch.optim.Optimizer, distil_share: UnitInterval, max_steps: PositiveInt, factor: PositiveFloat
) -> torch.optim.lr_scheduler.LambdaLR:
    """An lr_schedule: the rate while distilling, and `factor` times it while forgetting."""
    stage = distil_steps(distil_share, max_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < stage else factor)


@final
class SFD(Distillation):
    """Distils the teacher into a one-step generator, and under the forget labels into what `override` says instead.

    Reads no image: labels are drawn, pictures come from the generator. `fake_update` is the fake score's optimizer,
    `update` the generator's, whose weights (or their average) are what ships, as a `OneStep` model.

    Args:
        override: a rule of overrides.py, called with the labels.
        batch_size: samples under retain labels in each of a step's two parts.
        forget_samples: those under forget labels, as a share of batch_size; they weigh the same however many they are.
        forget_weight: of the forget term in both losses, the retain term having 1.
        alpha: of `generator_loss`.
        distil_share: share of the steps at the beginning in which nothing is forgotten (the two-stage variant).
        second_teacher: who teaches after them: the "base"; or the "fake_score" as it is then, frozen, which knows the
            pictures of the distilled generator instead of the base's: the released code's second stage, whose
            optimizers begin anew, as they do not here.
        max_steps: of the run.
        noise: where the generator begins, and where the scores are compared.
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        override: Callable[[Labels], Override],
        batch_size: BatchSize,
        max_steps: PositiveInt,
        noise: NoiseRange,
        forget_samples: Annotated[float, Gt(0), Le(1)] = 0.125,
        forget_weight: PositiveFloat = 0.01,
        alpha: float = 1.2,
        distil_share: Annotated[float, Ge(0), Lt(1)] = 0.0,  # at 1 nothing would be forgotten
        second_teacher: Literal["base", "fake_score"] = "base",
    ):
        method_options.something_to_forget(distil_share, max_steps)
        method_options.second_stage(distil_share, second_teacher)
        super().__init__(setting, update, fake_update, noise)
        self.labels = LabelSampler(setting.labels, batch_size, forget_samples, forget_weight)
        self.override = override(setting.labels)
        self.alpha = alpha
        self.distil_steps = distil_steps(distil_share, max_steps)
        self.fake_teaches = second_teacher == "fake_score"
        self.taken = Counter()

    def step(self, batch: Batch) -> Metrics:
        if self.fake_teaches and self.taken.value == self.distil_steps:
            copy_weights(self.trio.teacher, self.trio.fake)

        # 1. fake score: the generator's images under both kinds of labels are what it learns
        metrics = self.trio.teach_fake(self.fake_update, self._labels(), self.generator)

        # 2. generator: from where the fake score says its images come, towards where the teacher says they should
        drawn = self._labels()
        timesteps = self.trio.draw_timesteps(len(drawn.labels), self.generator)
        noised = self.trio.draw(drawn.labels, timesteps, self.generator)
        targets = drawn.labels
        if len(targets) > drawn.kept:
            asked = OverrideBatch(
                noised.x0[drawn.kept :].detach(), targets[drawn.kept :], self.trio.teacher, self.generator
            )
            targets = torch.cat([targets[: drawn.kept], self.override(asked)])
        losses = self.trio.generator_losses(noised, targets, drawn.labels, self.alpha)
        gradient = self.update.gradient((drawn.weights * losses).sum())
        self.update.apply(gradient)

        self.taken.value += 1
        return {
            **metrics,
            **split_losses("loss/", losses, drawn.kept, self.trio.teacher.num_entries),
            "grad_norm/generator": gradient.norm(),
        }

    def _labels(self) -> Drawn:
        return self.labels.draw(self.generator, self.trio.device, self.taken.value >= self.distil_steps)

    def stateful(self) -> dict[str, Stateful]:
        teacher = {"teacher": self.trio.teacher} if self.fake_teaches else {}
        return {**super().stateful(), **teacher, "steps": self.taken}

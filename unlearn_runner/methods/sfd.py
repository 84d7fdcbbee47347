"""SFD: Score Forgetting Distillation (ICLR 2025, 2409.11219): a one-step generator that never learns what is forgotten.

# Notation (variable -> paper)
# teacher, fake, generator -> phi, psi, theta;  x0 -> x_g = G_theta(z, c);  z -> z, pure noise
# x0_teacher, x0_fake -> f_phi(x_t, t, c), f_psi(x_t, t, c), the two networks' guesses of x0
# difference -> their D;  alpha -> alpha;  omega -> omega_t, the weight's denominator
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.method import Counter, Method, Setting, Update, copy_weights
from unlearn_runner.methods.overrides import Asked, Override, drawn_labels
from unlearn_runner.models.model import (
    GenerativeModel,
    predict_eps,
    predict_x0,
    squared_error,
)
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.options import BatchSize, PositiveFloat, PositiveInt, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def fake_score_loss(eps_pred: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """What the fake score minimises: ||eps_psi(x_t, t, c) - eps||^2 at a noised image of the generator.

    Summed over pixels. In [0, inf).
    """
    return squared_error(eps_pred, eps)


def generator_loss(
    x0_teacher: Float[Tensor, "b c h w"],
    x0_fake: Float[Tensor, "b c h w"],
    x0: Float[Tensor, "b c h w"],
    alpha: float,
) -> Float[Tensor, "b"]:
    """What the generator minimises: D . [(f_phi - x_g) - alpha D] / omega with D = f_phi - f_psi.

    omega, the mean of |f_phi - x_g| over an image's pixels, carries no gradient. Summed over pixels; any sign. With
    alpha = 1 it is D . (f_psi - x_g) / omega. Where the teacher is asked about another class than the fake score, the
    generator is drawn to that class.
    """
    difference = x0_teacher - x0_fake
    omega = (x0_teacher - x0).abs().flatten(1).mean(1).detach().clamp(min=1e-5)
    return (difference * ((x0_teacher - x0) - alpha * difference)).flatten(1).sum(1) / omega


class Drawn(NamedTuple):
    """Labels to draw images under, those to keep before those to forget, and what each sample weighs in a loss."""

    labels: Int64[Tensor, "b"]
    weights: Float[Tensor, "b"]
    kept: int  # how many of them are retain labels


@final
class LabelSampler:
    """Labels for one part of a step: `batch_size` retain labels, and `forget_samples` times as many forget labels.

    The weighted sum of losses has the mean E_retain[loss] + forget_weight E_forget[loss] whatever the share, so the
    forget term, which weighs little, needs few samples: at least one, and none without a weight.
    """

    def __init__(self, labels: Labels, batch_size: int, forget_samples: float, forget_weight: float):
        self.labels, self.num_retain, self.forget_weight = labels, batch_size, forget_weight
        self.num_forget = max(1, round(forget_samples * batch_size)) if forget_weight else 0

    def draw(self, generator: torch.Generator, device: torch.device, forgetting: bool = True) -> Drawn:
        """Without `forgetting`, retain labels alone."""
        num_forget = self.num_forget if forgetting else 0
        chosen = torch.cat(
            [
                drawn_labels(part, count, generator, device)
                for part, count in ((self.labels.retain, self.num_retain), (self.labels.forget, num_forget))
            ]
        )
        weights = torch.full((len(chosen),), 1 / self.num_retain, device=device)
        weights[self.num_retain :] = self.forget_weight / max(num_forget, 1)
        return Drawn(chosen, weights, self.num_retain)


class Noised(NamedTuple):
    """Images of the generator, and what the two scores are asked about."""

    x0: Float[Tensor, "b c h w"]
    x_t: Float[Tensor, "b c h w"]
    timesteps: Int64[Tensor, "b"]
    eps: Float[Tensor, "b c h w"]

    def select(self, rows: slice) -> "Noised":
        return Noised(*(part[rows] for part in self))


@dataclass(frozen=True)
class NoiseRange:
    """Ratios sigma_t / gamma_t, the same noise on every schedule: what the generator receives as the level of its pure
    noise, and between which the two scores are compared, uniformly over timesteps. Defaults: the paper's t = 440,
    38, 711 on CIFAR-10's linear schedule.
    """

    init: PositiveFloat = 2.502
    least: PositiveFloat = 0.137
    most: PositiveFloat = 13.01

    def __post_init__(self) -> None:
        method_options.range_of_noise(self.least, self.most)


@final
class Trio:
    """Teacher, fake score and generator. `begin` gives the latter two the teacher's weights."""

    def __init__(self, model: GenerativeModel, noise: NoiseRange):
        self.first, self.last, start = (
            model.path.timestep_with_ratio(getattr(noise, part), f"method.noise.{part}")
            for part in ("least", "most", "init")
        )
        self.fake = copy.deepcopy(model)
        self.generator = OneStep(copy.deepcopy(model), start)
        self.teacher = model.requires_grad_(False)
        self.networks = (self.generator, self.fake, self.teacher)

    def begin(self) -> None:
        for network in (self.fake, self.generator.network):
            copy_weights(network, self.teacher)

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Int64[Tensor, "{count}"]:
        """Uniform over those between which the scores are compared."""
        return torch.randint(self.first, self.last + 1, (count,), generator=generator, device=self.device)

    def draw(self, labels: Int64[Tensor, "b"], timesteps: Int64[Tensor, "b"], generator: torch.Generator) -> Noised:
        """An image for each label by the generator, with its gradient, noised to these levels."""
        z, eps = torch.randn((2, len(labels), *self.teacher.sample_shape), generator=generator, device=self.device)
        x0 = self.generator.predict(z, torch.zeros_like(labels), labels)
        return Noised(x0, self.teacher.noising(x0, timesteps, labels).sample(eps), timesteps, eps)

    def fake_losses(
        self, labels: Int64[Tensor, "b"], timesteps: Int64[Tensor, "b"], generator: torch.Generator
    ) -> Float[Tensor, "b"]:
        """`fake_score_loss` at fresh images under these labels; the generator gets no gradient."""
        with torch.no_grad():
            drawn = self.draw(labels, timesteps, generator)
        eps_pred, _ = predict_eps(self.fake, drawn.x0, drawn.eps, drawn.timesteps, labels)
        return fake_score_loss(eps_pred, drawn.eps)

    def teach_fake(self, update: Update, drawn: Drawn, generator: torch.Generator) -> Metrics:
        """The fake score's part of a step: what the generator draws under these labels is what it learns."""
        losses = self.fake_losses(drawn.labels, self.draw_timesteps(len(drawn.labels), generator), generator)
        gradient = update.gradient((drawn.weights * losses).sum())
        update.apply(gradient)
        pixels = self.teacher.num_entries
        return {**split_losses("loss/fake_", losses, drawn.kept, pixels), "grad_norm/fake": gradient.norm()}

    def generator_losses(
        self, drawn: Noised, teacher_labels: Int64[Tensor, "b"], fake_labels: Int64[Tensor, "b"], alpha: float
    ) -> Float[Tensor, "b"]:
        """`generator_loss` with the teacher asked about one class and the fake score about another.

        The teacher predicts with its guidance, if it has one: what it draws with it is what the generator is to draw.
        """
        x0_teacher = predict_x0(self.teacher, drawn.x_t, drawn.timesteps, teacher_labels, guided=True)
        x0_fake = predict_x0(self.fake, drawn.x_t, drawn.timesteps, fake_labels)
        return generator_loss(x0_teacher, x0_fake, drawn.x0, alpha)


def two_stage_rate(
    optimizer: torch.optim.Optimizer, distil_share: UnitInterval, max_steps: PositiveInt, factor: PositiveFloat
) -> torch.optim.lr_scheduler.LambdaLR:
    """An lr_schedule: the rate while distilling, and `factor` times it while forgetting."""
    stage = distil_steps(distil_share, max_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < stage else factor)


def distil_steps(share: float, max_steps: int) -> int:
    """How many steps a share of them is."""
    return round(share * max_steps)


@final
class SFD(Method):
    """Distils the teacher into a one-step generator, and under the forget labels into what `override` says instead.

    Reads no image: labels are drawn, pictures come from the generator. `fake_update` is the fake score's optimizer,
    `update` the generator's, whose weights (or their average) are what ships, as a `OneStep` model.

    Args:
        override: a rule of methods/overrides.py, called with the labels.
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
        self.trio = Trio(setting.model, noise)
        self.reads = Streams(retain=None, forget=False)
        self.networks = self.trio.networks
        self.labels = LabelSampler(setting.labels, batch_size, forget_samples, forget_weight)
        self.override = override(setting.labels)
        self.alpha = alpha
        self.distil_steps = distil_steps(distil_share, max_steps)
        self.fake_teaches = second_teacher == "fake_score"
        self.taken = Counter()
        self.update = update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.trio.begin()

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
            asked = Asked(noised.x0[drawn.kept :].detach(), targets[drawn.kept :], self.trio.teacher, self.generator)
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
        return {**distillation_state(self.update, self.fake_update, self.generator), **teacher, "steps": self.taken}


def distillation_state(update: Update, fake_update: Update, generator: torch.Generator) -> dict[str, Stateful]:
    """What a resumed distillation needs. The teacher is the base, which every run loads anyway."""
    fake = {f"fake_{name}": part for name, part in fake_update.stateful().items()}
    return {**update.stateful(), **fake, "noise": GeneratorState(generator)}


def split_losses(prefix: str, losses: Float[Tensor, "b"], kept: int, pixels: int) -> Metrics:
    """<prefix>retain and, if there are forget samples, <prefix>forget: means over samples and pixels."""
    parts = {"retain": losses[:kept], "forget": losses[kept:]}
    return {prefix + name: part.detach().mean() / pixels for name, part in parts.items() if len(part)}

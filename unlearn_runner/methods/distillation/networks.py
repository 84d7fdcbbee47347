"""What SFD (2409.11219) and the hybrids have in common: the three networks, their losses, and the labels they learn.

# Notation (variable -> paper)
# teacher, fake, generator -> phi, psi, theta;  x0 -> x_g = G_theta(z, c);  z -> z, pure noise
# x0_teacher, x0_fake -> f_phi(x_t, t, c), f_psi(x_t, t, c), the two networks' guesses of x0
# difference -> their D;  alpha -> alpha;  omega -> omega_t, the weight's denominator
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.distillation.overrides import drawn_labels
from unlearn_runner.methods.method import Method, Setting, Update, copy_weights
from unlearn_runner.models.model import GenerativeModel, predict_eps, predict_x0, squared_error
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.options import PositiveFloat
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import GeneratorState, Metrics, Stateful, Streams


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
class DistillationNetworks:
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


def distil_steps(share: float, max_steps: int) -> int:
    """How many steps a share of them is."""
    return round(share * max_steps)


class Distillation(Method):
    """What ships is the one-step generator, which learns from the teacher and the fake score and from no image.

    Args:
        update: of the generator.
        fake_update: of the fake score.
    """

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        noise: NoiseRange,
    ):
        self.trio = DistillationNetworks(setting.model, noise)
        self.reads = Streams(retain=None, forget=False)
        self.networks = self.trio.networks
        self.update = update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.trio.begin()

    def stateful(self) -> dict[str, Stateful]:
        """Without the teacher, which is the base: every run loads it anyway."""
        fake = {f"fake_{name}": part for name, part in self.fake_update.stateful().items()}
        return {**self.update.stateful(), **fake, "noise": GeneratorState(self.generator)}


def split_losses(prefix: str, losses: Float[Tensor, "b"], kept: int, pixels: int) -> Metrics:
    """<prefix>retain and, if there are forget samples, <prefix>forget: means over samples and pixels."""
    parts = {"retain": losses[:kept], "forget": losses[kept:]}
    return {prefix + name: part.detach().mean() / pixels for name, part in parts.items() if len(part)}

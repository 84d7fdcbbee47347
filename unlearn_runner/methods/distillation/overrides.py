"""Which class takes the place of the forgotten one in Score Forgetting Distillation. Your own rule is a class here.

It is constructed with the labels, where it checks what the user gave, and called at every step with what it may see.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.models.model import DiffusionModel, predict_x0
from unlearn_runner.options import NonNegativeInt, PositiveInt
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels


class OverrideBatch(NamedTuple):
    """What a rule may look at."""

    x0: Float[Tensor, "b c h w"]  # what the generator draws under the forget labels; detached
    forget: Int64[Tensor, "b"]  # those labels
    teacher: DiffusionModel
    generator: torch.Generator


class Override(ABC):
    """Chooses a retained label for each sample. Constructed with the dataset's labels."""

    @abstractmethod
    def __call__(self, asked: OverrideBatch) -> Int64[Tensor, "b"]: ...


@final
class Fixed(Override):
    """The same label for all."""

    def __init__(self, labels: Labels, label: NonNegativeInt):
        method_options.label_that_is_kept(label, labels.retain)
        self.label = label

    def __call__(self, asked: OverrideBatch) -> Int64[Tensor, "b"]:
        return torch.full_like(asked.forget, self.label)


@final
class RandomOther(Override):
    """Any retained label, each as likely as the others."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def __call__(self, asked: OverrideBatch) -> Int64[Tensor, "b"]:
        return drawn_labels(self.labels.retain, len(asked.forget), asked.generator, asked.forget.device)


@final
class Classifier(Override):
    """The retained label that the picture looks most like: the choice of a classifier that may not say "forget".

    The classifier is the teacher itself (`class_costs`), so the method stays free of data: one that was trained on the
    images would bring them in, and the evaluation's would be judge in its own cause.

    Args:
        num_draws: noises that a picture is judged by.
    """

    def __init__(self, labels: Labels, num_draws: PositiveInt = 1):
        self.labels, self.num_draws = labels, num_draws

    def __call__(self, asked: OverrideBatch) -> Int64[Tensor, "b"]:
        start = torch.full_like(asked.forget, -1)
        costs = class_costs(asked.teacher, asked.x0, start, self.labels.retain, self.num_draws, asked.generator)
        return torch.tensor(self.labels.retain, device=asked.forget.device)[costs.argmin(1)]


def class_costs(
    teacher: DiffusionModel,
    x_t: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, "b"],
    labels: Sequence[int],
    num_draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "b r"]:
    """An estimate of -log p(x_t|c) in nats for each label c, up to a constant that all labels share.

    A diffusion classifier (2303.16203), for pictures that may be noisy already: the variational bound of the diffusion
    that begins at x_t, whose signal-to-noise ratio at s > t is snr' = a^2 / v with x_s = a x_t + sqrt(v) eps. Its
    integral 1/2 int E||x_t - E[x_t|x_s, c]||^2 d snr' is taken at `num_draws` random s, the same and with the same
    noise for all labels. Timestep -1 stands for a picture without noise.
    """
    b, path = len(x_t), teacher.path
    scale, std = path.amplitudes(timesteps)
    last = path.num_train_timesteps - 1
    costs = x_t.new_zeros(b, len(labels))
    every = torch.tensor(labels, device=x_t.device).repeat(b)
    informative = (timesteps + 1 < last)[:, None, None, None]  # later on nothing is left that could say more
    with torch.no_grad():
        for _ in range(num_draws):
            # s - 1 and s are both above t, so that no step of the sum is infinitely informative
            steps = (last - timesteps - 1).clamp(min=1)
            drawn = (torch.rand(b, generator=generator, device=x_t.device) * steps).long()
            s = (timesteps + 2 + drawn).clamp(max=last)
            eps = torch.randn(x_t.shape, generator=generator, device=x_t.device)
            (a, noise), (before, noise_before) = path.transition(timesteps, s), path.transition(timesteps, s - 1)
            tiny = torch.finfo(a.dtype).tiny
            noise = noise.clamp(min=tiny)
            gain = before.square() / noise_before.clamp(min=tiny) - a.square() / noise
            gain = torch.where(informative, gain, 0.0)
            x_s = a * x_t + noise.sqrt() * eps
            guess = predict_x0(
                teacher, x_s.repeat_interleave(len(labels), 0), s.repeat_interleave(len(labels)), every
            ).view(b, len(labels), *x_t.shape[1:])
            # E[x_t|x_s, x0]: precision-weighted mean of what x_s says of x_t and what x0 says of it
            trust = std.square() * a / (noise + a.square() * std.square())
            mean = scale[:, None] * guess
            mean = mean + trust[:, None] * (x_s[:, None] - a[:, None] * mean)
            costs += (0.5 * gain.view(b, 1) * steps[:, None]) * (x_t[:, None] - mean).square().flatten(2).sum(2)
    return costs / num_draws


def drawn_labels(
    labels: Sequence[int], count: int, generator: torch.Generator, device: torch.device
) -> Int64[Tensor, "{count}"]:
    """Labels, each as likely as the others."""
    chosen = torch.randint(len(labels), (count,), generator=generator, device=device)
    return torch.tensor(labels, device=device)[chosen]

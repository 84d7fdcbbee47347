"""Deletion by posterior targets: at a noisy forget image the network learns what the retained images say of it.

Bounded, without ascent, importance weights or a norm fix. ReTrack (2509.13007, methods/retrack.py) comes to nearly the
same target from importance sampling, with the k retained images nearest to the forget image alone.
"""

from collections.abc import Callable
from typing import Annotated, Literal, final

import torch
from annotated_types import Gt
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.denoising import draw_eps
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.retained_images import TRUST_CAP, beside, retained_images, trust
from unlearn_runner.methods.siss.timesteps import TimestepSampler, Uniform
from unlearn_runner.models.model import GenerativeModel, Noising
from unlearn_runner.options import PositiveInt, UnitInterval
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


@final
class Posterior(Method):
    """Fine-tunes on noisy retained images, each to be denoised into itself, and under the forget conditions on noisy
    samples that are to be denoised into the posterior mean of the retained images.

    That mean is what a network with the least denoising loss on the retained images predicts, so whatever the samples
    are drawn from, the minimiser is the same: the retrained oracle's. Where no retained image has a forget condition,
    an oracle's prediction under it is anyone's guess, and `without_images` says what is drawn.

    Args:
        lambd: share of samples under the forget conditions, in [0, 1]. 0 is naive deletion.
        follow: share of these that begin at a retained image of the condition instead of a forget image: there the
            sampler arrives once it has been turned away. Its target is the image itself.
        without_images: what explains samples under a label or prompt that no retained image has: "nearest", the images
            of the label that its forget images, made noisy, are most likely of; "all" retained images.
        k: how many retained images explain a sample, those that are nearest to it; None: all.
        subset: of so many retained images only, which the target is then an estimate from; None: of all. Half of them
            are the nearest to the forget images without noise, as many of each, found once; the others are drawn anew
            at every step and stand for the rest (all, where there are too many forget images for one near each).
        cap: of `trust`, by which noisy forget images count. None: each counts by 1. Without effect on a VAE, whose
            targets are images.
        timesteps: which timesteps to look at; None: uniformly drawn ones.
    """

    requires = ("images",)

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        lambd: UnitInterval = 0.25,
        follow: UnitInterval = 0.5,
        without_images: Literal["nearest", "all"] = "nearest",
        k: PositiveInt | None = None,
        subset: PositiveInt | None = None,
        cap: Annotated[float, Gt(0)] | None = TRUST_CAP,
        timesteps: TimestepSampler | None = None,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.labels = setting.labels
        self.lambd, self.follow, self.k, self.subset, self.cap = lambd, follow, k, subset, cap
        self.without_images = without_images
        self.timesteps = Uniform() if timesteps is None else timesteps
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.retained = retained_images(self.trained, images, self.labels, self.without_images, self.generator, self.k)
        if self.subset is not None:
            self.retained.always_nearest(images.forget, self.subset // 2)

    def step(self, batch: Batch) -> Metrics:
        model, g, b = self.trained, self.generator, len(batch.x0_retain)
        device = batch.x0_retain.device

        # 1. which samples are under the forget conditions, and the images that they are drawn from
        timesteps, weights = self.timesteps.draw(b, model.num_train_timesteps, g, device)
        eps = draw_eps(model, batch.x0_retain, g)
        forgets, following = torch.rand((2, b), generator=g, device=device)
        forgets, following = forgets < self.lambd, following < self.follow
        astray, follows = (forgets & ~following).nonzero()[:, 0], (forgets & following).nonzero()[:, 0]
        with torch.no_grad():
            x0 = model.encode(torch.where(beside(forgets, batch.x0_retain), batch.x0_forget, batch.x0_retain))
        cond = batch.cond_retain
        if cond is not None:
            cond = torch.where(beside(forgets, cond), batch.cond_forget, cond)
        own = cond  # of the image that a sample is drawn from
        if len(follows):
            retained, labels = self.retained.drawn_for(_some(cond, follows), len(follows), g)
            x0[follows] = retained.to(x0.dtype)
            if own is not None:
                own = own.index_copy(0, follows, labels)

        # 2. the samples, and what those from forget images are to be denoised into
        noising = model.noising(x0, timesteps, own)
        m = noising.sample(eps)
        if len(astray):
            q = Noising(*(part if isinstance(part, float) else part[astray] for part in noising))
            subset = self.retained.subset(self.subset, g)
            x0[astray] = self.retained.target(m[astray], q, _some(cond, astray), x0[astray], self.k, subset)
            if model.is_diffusion:
                led, towards = eps[astray], (m[astray] - q.scale * x0[astray]) / q.std
                eps = eps.index_copy(0, astray, towards.to(eps))
                if self.cap is not None:
                    trusted = trust(towards - led, self.cap).to(weights)
                    weights = weights.index_copy(0, astray, weights[astray] * trusted)

        # 3. the loss, and the update
        prediction = model.predict(m, timesteps, cond)
        losses = model.loss(prediction, x0, m, eps, noising.std, timesteps) / model.num_entries
        gradient = self.update.gradient((weights * losses).mean())
        self.update.apply(gradient)

        losses = losses.detach()
        self.timesteps.learn(timesteps / model.num_train_timesteps, losses)
        return {
            "loss/retain": _mean_of(losses, ~forgets),
            "loss/forget": _mean_of(losses * weights, forgets),
            "grad_norm/update": gradient.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator), "timesteps": self.timesteps}


def _some(cond: Shaped[Tensor, "b ..."] | None, rows: Int64[Tensor, "n"]) -> Shaped[Tensor, "n ..."] | None:
    return None if cond is None else cond[rows]


def _mean_of(losses: Float[Tensor, "b"], rows: Bool[Tensor, "b"]) -> Float[Tensor, ""]:
    """Their mean over these rows; 0 if there are none."""
    return (losses * rows).sum() / rows.sum().clamp(min=1)

"""Deletion by posterior targets: at a noisy forget image the network learns what the retained images say of it.

Bounded, without ascent, importance weights or a norm fix. ReTrack (2509.13007), below, comes to nearly the same target
from importance sampling, with the k retained images nearest to the forget image alone.

# Notation (variable -> 2206.00364, appendix B.3, where the ideal denoiser of a finite set is derived)
# m, scale, std -> x, s(t), s(t) sigma(t); retained images -> y_1..y_Y; target -> D(x; sigma)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal, NamedTuple, final

import torch
from annotated_types import Gt
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.data.streams import Images, ImageSet
from unlearn_runner.methods.denoising import draw_eps, draw_noise, drawn_loss
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.timesteps import TimestepSampler, Uniform
from unlearn_runner.models.model import GenerativeModel, Noising
from unlearn_runner.options import PositiveInt, UnitInterval
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams

ENOUGH = 256  # forget images, to tell which label they are nearest to
EVERY = -1  # in place of a label: any image
CHUNK = 2**24  # numbers of a set that are compared at once: 64 MiB


def posterior(log_densities: Float[Tensor, "b n"], k: int | None = None) -> Float[Tensor, "b n"]:
    """p(x_i | m) of n images that were equally likely, of each m: softmax of log q(m|x_i) (2206.00364, equation 57).

    With `k`, of the k images alone from which m is likeliest (2509.13007); an image whose log-density is -inf has none.
    """
    if k is None or k >= log_densities.shape[1]:
        return log_densities.softmax(1)
    largest, rows = log_densities.topk(k, dim=1)
    return torch.zeros_like(log_densities).scatter(1, rows, largest.softmax(1))


def trust(astray: Float[Tensor, "b ..."], cap: float) -> Float[Tensor, "b"]:
    """min(1, cap D / ||astray||^2), by which a sample counts. D is the number of entries, `astray` the noise that would
    lead to it from its target, less the noise that led to it.

    With little noise that is large, and the sampler does not come there once it has been turned away. A network that
    still answers with the noise that led there has a loss of at most cap for each entry.
    """
    return (cap / astray.square().flatten(1).mean(1).clamp(min=1e-12)).clamp(max=1)


class Part(NamedTuple):
    """Some of the retained images, in place of all."""

    numbers: Int64[Tensor, "n"]
    log_counts: Float[Tensor, "n"]  # log of how many images each of them stands for


class Seen(NamedTuple):
    """Some of the retained images, flat, as the posterior sees them."""

    centers: Float[Tensor, "n d"]  # of q(m|x)
    stds: Float[Tensor, "n d"] | None  # of q(m|x); None: the same of every image
    images: Float[Tensor, "n p"] | None  # what the network should answer with; None: the centers
    squares: Float[Tensor, "n"] | None = None  # of the centers, summed, where they are known already


def _log_densities(m: Float[Tensor, "b d"], noising: Noising, images: Seen) -> Float[Tensor, "b n"]:
    """log q(m|x_i) but for what is the same of all images."""
    if images.stds is None:
        scale, std = noising.scale.flatten(1), noising.std.flatten(1)
        squares = images.centers.square().sum(1) if images.squares is None else images.squares
        return scale / std.square() * (m @ images.centers.T - scale / 2 * squares)
    precisions = images.stds.square().reciprocal()
    inner = m @ (images.centers * precisions).T - m.square() @ precisions.T / 2
    return inner - ((images.centers.square() * precisions) / 2 + images.stds.log()).sum(1)


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products without TF32, whose three digits are too few to tell near images apart at little noise, where the
    noise that leads from an image to a sample multiplies its error, too.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@final
class RetainedImages:
    """The retained images as a distribution that noisy samples are explained by.

    Mirrored ones are among them where training mirrors. A set that fits on the device is kept there as floats; of one
    that does not, parts are read at every step.

    Args:
        stand_in: for each label that samples will have, the label whose images explain them; None: all images do. Only
            images are kept that explain something.
    """

    def __init__(self, model: GenerativeModel, images: ImageSet, stand_in: Mapping[int, int | None]):
        self.model, self.images = model, images
        rows = torch.arange(len(images))
        self.labels, self.wanted = images.labels, None
        if self.labels is not None:
            wanted = {label: EVERY if other is None else other for label, other in stand_in.items()}
            self.wanted = torch.tensor([wanted.get(label, EVERY) for label in range(model.num_labels)])
            self.wanted = self.wanted.to(self.labels.device)
            if EVERY not in wanted.values():
                explaining = torch.tensor(list(wanted.values()), device=self.labels.device)
                rows = torch.isin(self.labels, explaining).nonzero()[:, 0].cpu()
        self.rows = torch.cat([rows] * (2 if images.mirrored else 1))  # the second half left to right
        if self.labels is not None:
            self.labels = self.labels[self.rows.to(self.labels.device)]
            self.by_label = self.labels.argsort(stable=True)
            self.counts = self.labels.bincount(minlength=model.num_labels)
        self.num_plain, self.kept = len(rows), None
        self.near = torch.zeros(0, dtype=torch.int64)
        if images.resident:
            parts = zip(*self._read(None), strict=True)
            kept = Seen(*(None if part[0] is None else torch.cat(part) for part in parts))
            self.kept = kept._replace(squares=kept.centers.square().sum(1))

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def keep_near(self, forget: ImageSet, count: int) -> None:
        """Let `some` have up to so many images always: as many of each forget image's nearest as of the others'."""
        each, near = count // len(forget), []
        if each:
            for rows in torch.arange(len(forget)).split(ENOUGH):
                x0, cond = forget.take(rows)
                near.append(self.nearness(encoded(self.model, x0), cond).topk(min(each, len(self)), dim=1).indices)
            self.near = torch.cat(near).unique()

    def some(self, count: int | None, generator: torch.Generator) -> Part | None:
        """So many of them: those of `keep_near`, and others, drawn with replacement, which stand for all others. None,
        which stands for all, if there are no more.
        """
        if count is None or count >= len(self):
            return None
        near = self.near.to(generator.device)
        drawn = torch.randint(len(self), (count - len(near),), generator=generator, device=generator.device)
        drawn = drawn[~torch.isin(drawn, near)]
        log_count = math.log((len(self) - len(near)) / max(1, len(drawn)))
        log_counts = torch.cat([torch.zeros(len(near)), torch.full((len(drawn),), log_count)])
        return Part(torch.cat([near, drawn]), log_counts.to(near.device))

    def take(self, numbers: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor | None]:
        """Images, encoded, by their number, and their labels."""
        rows = self.rows[numbers.cpu()]
        x0, labels = self.images.take(rows)
        if self.images.mirrored:
            flipped, _ = self.images.take(rows, mirrored=True)
            x0 = torch.where(_beside(numbers >= self.num_plain, x0), flipped, x0)
        return encoded(self.model, x0), labels

    def _parts(self, some: Part | None, dtype: torch.dtype) -> Iterator[Seen]:
        """These images, or all, a part at a time."""
        for part in self._read(None if some is None else some.numbers):
            yield Seen(*(None if values is None else values.to(dtype) for values in part))

    def _read(self, numbers: Int64[Tensor, "n"] | None) -> Iterator[Seen]:
        if self.kept is not None:
            kept = self.kept
            yield kept if numbers is None else Seen(*(None if part is None else part[numbers] for part in kept))
            return
        numbers = torch.arange(len(self)) if numbers is None else numbers
        for part in numbers.split(max(1, CHUNK // self.model.num_entries)):
            x0, labels = self.take(part)
            if self.model.is_diffusion:
                yield Seen(x0.flatten(1), None, None)
            else:
                q = self.model.noising(x0, torch.zeros(len(x0), dtype=torch.int64, device=x0.device), labels)
                yield Seen(q.center.flatten(1), q.std.flatten(1), x0.flatten(1))

    def log_densities(
        self,
        m: Float[Tensor, "b ..."],
        noising: Noising,
        cond: Shaped[Tensor, "b"] | None,
        some: Part | None = None,
    ) -> Float[Tensor, "b n"]:
        """log q(m|x_i) of each image, or of some, but for what is the same of all; -inf where it does not explain the
        condition, and another one of them does.

        `noising` is that of the images that the m were drawn from; of a diffusion model its scale and std are those of
        every image at the same timestep.
        """
        with full_precision():
            parts = self._parts(some, m.dtype)
            densities = torch.cat([_log_densities(m.flatten(1), noising, part) for part in parts], 1)
        if some is not None:
            densities = densities + some.log_counts.to(densities)
        if cond is None or self.labels is None:
            return densities
        labels, wanted = self.labels if some is None else self.labels[some.numbers], self.wanted[cond][:, None]
        explains = (labels == wanted) | (wanted == EVERY)
        return densities.masked_fill(~(explains | ~explains.any(1, keepdim=True)), -torch.inf)

    def mean(
        self, weights: Float[Tensor, "b n"], like: Float[Tensor, "b ..."], some: Part | None = None
    ) -> Float[Tensor, "b ..."]:
        """The mean of the images, or of some, by these weights; in the shape of `like`."""
        total, start = torch.zeros_like(like).flatten(1), 0
        for part in self._parts(some, like.dtype):
            images = part.centers if part.images is None else part.images
            stop = start + len(images)
            with full_precision():
                total, start = total + weights[:, start:stop] @ images, stop
        return total.view_as(like)

    @torch.no_grad()
    def target(
        self,
        m: Float[Tensor, "b ..."],
        noising: Noising,
        cond: Shaped[Tensor, "b"] | None,
        like: Float[Tensor, "b ..."],
        k: int | None = None,
        some: Part | None = None,
    ) -> Float[Tensor, "b ..."]:
        """The posterior mean of the images, or of some, at each m; see `log_densities`."""
        return self.mean(posterior(self.log_densities(m, noising, cond, some), k), like, some)

    @torch.no_grad()
    def drawn_for(
        self, cond: Shaped[Tensor, "b"] | None, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n ..."], Shaped[Tensor, "n"] | None]:
        """For each of n samples one of the images that explain its condition, all alike, and its label."""
        share = torch.rand(n, generator=generator, device=generator.device)
        if cond is None or self.labels is None:
            return self.take((share * len(self)).long().clamp(max=len(self) - 1))  # 8 million of them round up
        wanted = self.wanted[cond]
        every = (wanted == EVERY) | (self.counts[wanted] == 0)
        first = torch.where(every, 0, (self.counts.cumsum(0) - self.counts)[wanted])
        count = torch.where(every, len(self), self.counts[wanted])
        return self.take(self.by_label[first + (share.to(count.device) * count).long().minimum(count - 1)])

    def nearness(self, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b"] | None) -> Float[Tensor, "b n"]:
        """`log_densities` without noise: the more, the nearer an image is."""
        start = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        first = self.model.noising(x0, start, cond)
        return self.log_densities(first.scale * first.center, first, cond)


@torch.no_grad()
def explaining(
    model: GenerativeModel,
    images: Images,
    labels: Labels | None,
    without_images: Literal["nearest", "all"],
    generator: torch.Generator,
    k: int | None = None,
) -> RetainedImages:
    """The retained images, as they explain samples under the forget conditions: those of the same label; where it has
    none, of the label that its forget images, made noisy, are most likely of ("nearest"), or all.
    """
    stand_in: dict[int, int | None] = {}
    if labels is not None:
        there = set(images.retain.labels.unique().tolist())
        stand_in = {label: label if label in there else None for label in labels.forget}
    if None in stand_in.values() and without_images == "nearest":
        everything = RetainedImages(model, images.retain, stand_in)
        for label in [label for label, other in stand_in.items() if other is None]:
            rows = (images.forget.labels == label).nonzero()[:ENOUGH, 0].cpu()
            # a prompt without a forget image of its own: those of the others
            x0, conds = images.forget.take(rows if len(rows) else torch.arange(len(images.forget))[:ENOUGH])
            x0 = encoded(model, x0)
            timesteps = torch.randint(model.num_train_timesteps, (len(x0),), generator=generator, device=x0.device)
            noising = model.noising(x0, timesteps, conds)
            m = noising.sample(draw_eps(model, x0, generator))
            weights = posterior(everything.log_densities(m, noising, conds), k)
            mass = torch.zeros(model.num_labels, device=weights.device)
            stand_in[label] = int(mass.index_add_(0, everything.labels, weights.sum(0)).argmax())
    return RetainedImages(model, images.retain, stand_in)


@final
class Posterior(Method):
    """Fine-tunes on noisy retained images, each to be denoised into itself, and under the forget conditions on noisy
    samples that are to be denoised into the posterior mean of the retained images.

    That mean is what a network with the least denoising loss on the retained images answers, so whatever the samples
    are drawn from, the minimiser is the same: the retrained oracle's. Where no retained image has a forget condition,
    an oracle's answer under it is anyone's guess, and `without_images` says what is drawn.

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
        cap: Annotated[float, Gt(0)] | None = 0.1,
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
        self.retained = explaining(self.trained, images, self.labels, self.without_images, self.generator, self.k)
        if self.subset is not None:
            self.retained.keep_near(images.forget, self.subset // 2)

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
            x0 = model.encode(torch.where(_beside(forgets, batch.x0_retain), batch.x0_forget, batch.x0_retain))
        cond = batch.cond_retain
        if cond is not None:
            cond = torch.where(_beside(forgets, cond), batch.cond_forget, cond)
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
            some = self.retained.some(self.subset, g)
            x0[astray] = self.retained.target(m[astray], q, _some(cond, astray), x0[astray], self.k, some)
            if model.is_diffusion:
                led, towards = eps[astray], (m[astray] - q.scale * x0[astray]) / q.std
                eps = eps.index_copy(0, astray, towards.to(eps))
                if self.cap is not None:
                    trusted = trust(towards - led, self.cap).to(weights)
                    weights = weights.index_copy(0, astray, weights[astray] * trusted)

        # 3. the loss, and the update
        answer = model.predict(m, timesteps, cond)
        losses = model.loss(answer, x0, m, eps, noising.std, timesteps) / model.num_entries
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


@final
class ReTrack(Method):
    """Redirects the denoising trajectory of each forget image towards the retained images nearest to it (2509.13007).

    As in its code (github.com/sqt24/ReTrack, retrack/methods.py), but for one thing: there the loss is the posterior's
    mean of squared distances to each of the k noises, here the squared distance to their mean. The difference does not
    depend on the network. Under conditions, which the paper's models of pixels have not, the nearest are sought among
    the images of the forget condition, or among all if it has none.

    Args:
        lambd: weight of the forget term, 1 - lambd that of the retain term, each on a batch of its own. The code has
            0.005 on MNIST, 0.02 on CIFAR-10, 0.5 on Stable Diffusion.
        k: how many retained images, the nearest to the forget image without noise.
    """

    requires = ("images", "noise")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        lambd: UnitInterval = 0.02,
        k: PositiveInt = 10,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained, self.labels = setting.model, setting.labels
        self.lambd, self.k = lambd, k
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.retained = explaining(self.trained, images, self.labels, "all", self.generator)

    def step(self, batch: Batch) -> Metrics:
        model, g = self.trained, self.generator

        # 1. retain images as they are
        losses_retain = drawn_loss(model, batch.x0_retain, batch.cond_retain, g) / model.num_entries

        # 2. noisy forget images, and the mean of their neighbours
        timesteps, eps = draw_noise(model, batch.x0_forget, g)
        with torch.no_grad():
            x0 = model.encode(batch.x0_forget)
            noising = model.noising(x0, timesteps, batch.cond_forget)
            m = noising.sample(eps)
            weights = self._weights(m, noising, x0, batch.cond_forget)
            target = self.retained.mean(weights, x0)
            eps = (m - noising.scale * target) / noising.std
        answer = model.predict(m, timesteps, batch.cond_forget)
        losses_forget = model.loss(answer, target, m, eps, noising.std, timesteps) / model.num_entries

        # 3. the update
        loss_retain, loss_forget = losses_retain.mean(), losses_forget.mean()
        gradient = self.update.gradient(self.lambd * loss_forget + (1 - self.lambd) * loss_retain)
        self.update.apply(gradient)
        return {
            "loss/retain": loss_retain.detach(),
            "loss/forget": loss_forget.detach(),
            "grad_norm/update": gradient.norm(),
        }

    def _weights(
        self, m: Float[Tensor, "b ..."], noising: Noising, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b"] | None
    ) -> Float[Tensor, "b n"]:
        """p(x_i | m) of the k images nearest to each x0, 0 of the others."""
        near = _largest(self.retained.nearness(x0, cond), self.k)
        return self.retained.log_densities(m, noising, cond).masked_fill(~near, -torch.inf).softmax(1)

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}


def _largest(values: Float[Tensor, "b n"], k: int) -> Bool[Tensor, "b n"]:
    """The k largest of each row, but none that is -inf."""
    rows = values.topk(min(k, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, rows, True) & values.isfinite()


def encoded(model: GenerativeModel, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
    """What the model takes noisy samples from; for an encoder that is a part of it, in the precision of its weights."""
    return model.encode(x0) if model.is_diffusion else x0.to(next(model.parameters()).dtype)


def _beside(rows: Bool[Tensor, "b"], others: Shaped[Tensor, "b ..."]) -> Bool[Tensor, "b ..."]:
    return rows.view(-1, *[1] * (others.ndim - 1))


def _some(cond: Shaped[Tensor, "b ..."] | None, rows: Int64[Tensor, "n"]) -> Shaped[Tensor, "n ..."] | None:
    return None if cond is None else cond[rows]


def _mean_of(losses: Float[Tensor, "b"], rows: Bool[Tensor, "b"]) -> Float[Tensor, ""]:
    """Their mean over these rows; 0 if there are none."""
    return (losses * rows).sum() / rows.sum().clamp(min=1)

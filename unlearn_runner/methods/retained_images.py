"""The retained images as a finite distribution: which of them a noisy sample may have come from, and their mean.

# Notation (variable -> 2206.00364, appendix B.3, where the ideal denoiser of a finite set is derived)
# m, scale, std -> x, s(t), s(t) sigma(t); retained images -> y_1..y_Y; target -> D(x; sigma)
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.data.streams import Images, ImageSet
from unlearn_runner.methods.denoising import draw_eps
from unlearn_runner.models.model import GenerativeModel, Noising
from unlearn_runner.spec import Labels

ENOUGH = 256  # forget images, to tell which label they are nearest to; also how many are compared at once
ANY = -1  # in place of a label: an image of any label
CHUNK = 2**24  # numbers of a set that are compared at once: 64 MiB
TRUST_CAP = 0.1  # of `trust`, by default


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
    still predicts the noise that led there has a loss of at most cap for each entry.
    """
    return (cap / astray.square().flatten(1).mean(1).clamp(min=1e-12)).clamp(max=1)


class Subset(NamedTuple):
    """Some of the retained images, in place of all."""

    numbers: Int64[Tensor, "n"]
    log_counts: Float[Tensor, "n"]  # log of how many images each of them stands for


class Flattened(NamedTuple):
    """Retained images and the distribution of their noisy samples, without noise, one row for each."""

    centers: Float[Tensor, "n d"]  # of q(m|x)
    stds: Float[Tensor, "n d"] | None  # of q(m|x); None: the same of every image
    images: Float[Tensor, "n p"] | None  # what the network should predict; None: the centers
    squares: Float[Tensor, "n"] | None = None  # of the centers, summed, where they are known already


def _log_densities(m: Float[Tensor, "b d"], noising: Noising, images: Flattened) -> Float[Tensor, "b n"]:
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
        stand_in: for each label that samples will have, the label whose images explain them. All images do where it is
            None, or no image has it. Only images are kept that explain something.
    """

    def __init__(self, model: GenerativeModel, images: ImageSet, stand_in: Mapping[int, int | None]):
        self.model, self.images = model, images
        rows = torch.arange(len(images))
        self.labels, self.explained_by = images.labels, None
        if self.labels is not None:
            there = set(self.labels.unique().tolist())
            explained_by = {label: other if other in there else ANY for label, other in stand_in.items()}
            every = [explained_by.get(label, ANY) for label in range(model.num_labels)]
            self.explained_by = torch.tensor(every, device=self.labels.device)
            if ANY not in explained_by.values():
                explaining = torch.tensor(list(explained_by.values()), device=self.labels.device)
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
            kept = Flattened(*(None if part[0] is None else torch.cat(part) for part in parts))
            self.kept = kept._replace(squares=kept.centers.square().sum(1))

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def always_nearest(self, forget: ImageSet, count: int) -> None:
        """Have up to `count` images in every `subset`: of each forget image equally many of those nearest to it."""
        each, near = count // len(forget), []
        if each:
            for rows in torch.arange(len(forget)).split(ENOUGH):
                x0, cond = forget.take(rows)
                near.append(self.nearness(encoded(self.model, x0), cond).topk(min(each, len(self)), dim=1).indices)
            self.near = torch.cat(near).unique()

    def subset(self, count: int | None, generator: torch.Generator) -> Subset | None:
        """`count` of them: those of `always_nearest`, and others, drawn with replacement, which stand for all others.
        None, which means all, if there are no more than `count`.
        """
        if count is None or count >= len(self):
            return None
        near = self.near.to(generator.device)
        drawn = torch.randint(len(self), (count - len(near),), generator=generator, device=generator.device)
        drawn = drawn[~torch.isin(drawn, near)]
        log_count = math.log((len(self) - len(near)) / max(1, len(drawn)))
        log_counts = torch.cat([torch.zeros(len(near)), torch.full((len(drawn),), log_count)])
        return Subset(torch.cat([near, drawn]), log_counts.to(near.device))

    def take(self, numbers: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor | None]:
        """Images, encoded, by their number, and their labels."""
        rows = self.rows[numbers.cpu()]
        x0, labels = self.images.take(rows)
        if self.images.mirrored:
            flipped, _ = self.images.take(rows, mirrored=True)
            x0 = torch.where(beside(numbers >= self.num_plain, x0), flipped, x0)
        return encoded(self.model, x0), labels

    def _parts(self, subset: Subset | None, dtype: torch.dtype) -> Iterator[Flattened]:
        """These images, or all, a part at a time."""
        for part in self._read(None if subset is None else subset.numbers):
            yield Flattened(*(None if values is None else values.to(dtype) for values in part))

    def _read(self, numbers: Int64[Tensor, "n"] | None) -> Iterator[Flattened]:
        if self.kept is not None:
            kept = self.kept
            yield kept if numbers is None else Flattened(*(None if part is None else part[numbers] for part in kept))
            return
        numbers = torch.arange(len(self)) if numbers is None else numbers
        for part in numbers.split(max(1, CHUNK // self.model.num_entries)):
            x0, labels = self.take(part)
            if self.model.is_diffusion:
                yield Flattened(x0.flatten(1), None, None)
            else:
                q = self.model.noising(x0, torch.zeros(len(x0), dtype=torch.int64, device=x0.device), labels)
                yield Flattened(q.center.flatten(1), q.std.flatten(1), x0.flatten(1))

    def log_densities(
        self,
        m: Float[Tensor, "b ..."],
        noising: Noising,
        cond: Shaped[Tensor, "b"] | None,
        subset: Subset | None = None,
    ) -> Float[Tensor, "b n"]:
        """log q(m|x_i) of each image, or of a subset's, but for what is the same of all; -inf where it does not explain
        the condition, and another one of them does.

        `noising` is that of the images that the m were drawn from; of a diffusion model its scale and std are those of
        every image at the same timestep.
        """
        with full_precision():
            parts = self._parts(subset, m.dtype)
            densities = torch.cat([_log_densities(m.flatten(1), noising, part) for part in parts], 1)
        if subset is not None:
            densities = densities + subset.log_counts.to(densities)
        if cond is None or self.labels is None:
            return densities
        labels = self.labels if subset is None else self.labels[subset.numbers]
        wanted = self.explained_by[cond][:, None]
        explains = (labels == wanted) | (wanted == ANY)
        if subset is not None:  # which may hold no image of that label
            explains = explains | ~explains.any(1, keepdim=True)
        return densities.masked_fill(~explains, -torch.inf)

    def mean(
        self, weights: Float[Tensor, "b n"], like: Float[Tensor, "b ..."], subset: Subset | None = None
    ) -> Float[Tensor, "b ..."]:
        """The mean of the images, or of a subset's, by these weights; in the shape of `like`."""
        total, start = torch.zeros_like(like).flatten(1), 0
        for part in self._parts(subset, like.dtype):
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
        subset: Subset | None = None,
    ) -> Float[Tensor, "b ..."]:
        """The posterior mean of the images, or of a subset's, at each m; see `log_densities`."""
        return self.mean(posterior(self.log_densities(m, noising, cond, subset), k), like, subset)

    @torch.no_grad()
    def drawn_for(
        self, cond: Shaped[Tensor, "b"] | None, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n ..."], Shaped[Tensor, "n"] | None]:
        """For each of n samples one of the images that explain its condition, all alike, and its label."""
        share = torch.rand(n, generator=generator, device=generator.device)
        if cond is None or self.labels is None:
            return self.take((share * len(self)).long().clamp(max=len(self) - 1))  # 8 million of them round up
        wanted = self.explained_by[cond]
        first = torch.where(wanted == ANY, 0, (self.counts.cumsum(0) - self.counts)[wanted])
        count = torch.where(wanted == ANY, len(self), self.counts[wanted])
        return self.take(self.by_label[first + (share.to(count.device) * count).long().minimum(count - 1)])

    def nearness(self, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b"] | None) -> Float[Tensor, "b n"]:
        """`log_densities` without noise: the more, the nearer an image is."""
        start = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        first = self.model.noising(x0, start, cond)
        return self.log_densities(first.scale * first.center, first, cond)


@torch.no_grad()
def retained_images(
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


def encoded(model: GenerativeModel, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
    """What the model takes noisy samples from; for an encoder that is a part of it, in the precision of its weights."""
    return model.encode(x0) if model.is_diffusion else x0.to(next(model.parameters()).dtype)


def beside(rows: Bool[Tensor, "b"], others: Shaped[Tensor, "b ..."]) -> Bool[Tensor, "b ..."]:
    return rows.view(-1, *[1] * (others.ndim - 1))

"""Endless batches of forget and retain images, drawn by index with an explicit generator."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.errors import NonFiniteError
from unlearn_runner.types import Batch, Streams, make_generator, moved


@final
class Shuffled:
    """Indices 0..n-1 in a new random order each epoch; a draw may straddle two epochs."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n = n
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int) -> Int64[Tensor, "{count}"]:
        while self.order.numel() < count:
            self.order = torch.cat([self.order, torch.randperm(self.n, generator=self.generator)])
        drawn, self.order = self.order[:count], self.order[count:]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order = state_dict["order"].cpu().clone()


@final
class Pool:
    """Rows of one or two image sets under one index; nothing is copied but what is moved to the device."""

    def __init__(self, parts: list[LabelledImages], device: torch.device):
        self.pixels = [part.pixels.to(device) for part in parts]
        self.labels = torch.cat([part.labels for part in parts]).to(device)
        self.contents = torch.cat([part.contents for part in parts]).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Int64[Tensor, "b"]) -> LabelledImages:
        rows = moved(indices, self.labels.device)
        pixels = self.pixels[0][rows.clamp(max=len(self.pixels[0]) - 1)]
        if len(self.pixels) == 2:
            beyond = rows - len(self.pixels[0])
            second = self.pixels[1][beyond.clamp(min=0)]
            pixels = torch.where((beyond >= 0)[:, None, None, None], second, pixels)
        return LabelledImages(pixels, self.labels[rows], self.contents[rows])


@final
class ImageSet:
    """All images to forget, or all to retain, as a network is given them: in [-1, 1], or their latents.

    `resident`: they fit on the device. `mirrored`: batches hold each of them left to right half of the times.
    """

    def __init__(self, images: LabelledImages, stream: "BatchStream"):
        self._images, self._stream = images, stream
        self.resident, self.mirrored = stream.data.resident, stream.horizontal_flip

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def _pool(self) -> Pool:
        """Moved to the device when they are first looked at."""
        return Pool([self._images], self._stream.keep_on)

    @property
    def labels(self) -> Int64[Tensor, "n"] | None:
        """Of all images, as `take` has them."""
        return self._stream.condition(self._pool.labels)

    def take(
        self, rows: Int64[Tensor, "b"], mirrored: bool = False
    ) -> tuple[Float[Tensor, "b ..."], Int64[Tensor, "b"] | None]:
        """Images, or left to right, and labels by row number; labels are None where the model is unconditional."""
        pixels, labels, _ = self._pool.take(rows)
        images, encode = to_unit_range(moved(pixels, self._stream.device)), self._stream.encode
        images = images.flip(-1) if mirrored else images
        return images if encode is None else encode(images), self._stream.condition(labels)


class Images(NamedTuple):
    """Both sets of a dataset, for a method that looks at them before it begins."""

    retain: ImageSet
    forget: ImageSet


@final
class BatchStream:
    """Batches of `batch_size` retain images and as many forget images, as far as the method reads them.

    Images stay uint8, on the device where they fit, memory-mapped where they do not; a batch is one
    indexing operation, no file is opened and nothing is decoded. Where they fit and are not mirrored, what a model's
    `encode` makes of them is kept in their place.
    """

    def __init__(
        self,
        data: ForgetRetain,
        reads: Streams,
        batch_size: int,
        seed: int,
        device: torch.device,
        encode: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b ..."]] | None = None,
    ):
        self.batch_size = batch_size
        self.device = device
        self.horizontal_flip = data.spec.horizontal_flip
        self.conditional = data.spec.label_names is not None
        self.encode = encode
        self.data = data
        self.forget_share = data.forget_share
        self.generator = make_generator(seed, "data")
        sources = {}
        if reads.retain is not None:
            sources["retain"] = [data.retain] + ([data.forget] if reads.retain == "all" else [])
        if reads.forget:
            sources["forget"] = [data.forget]
        self.keep_on = device if data.resident else torch.device("cpu")
        self.sources = {name: Pool(parts, self.keep_on) for name, parts in sources.items()}
        if encode is not None and data.resident and not self.horizontal_flip:
            for pool in self.sources.values():
                pool.pixels = [encoded(pixels, encode, device) for pixels in pool.pixels]
        self.indices = {name: Shuffled(len(pool), self.generator) for name, pool in self.sources.items()}

    def images(self) -> Images:
        return Images(ImageSet(self.data.retain, self), ImageSet(self.data.forget, self))

    def condition(self, labels: Int64[Tensor, "b"]) -> Int64[Tensor, "b"] | None:
        return moved(labels, self.device) if self.conditional else None

    def next(self) -> Batch:
        x0_retain, cond_retain = self._draw("retain")
        x0_forget, cond_forget = self._draw("forget")
        return Batch(x0_retain, x0_forget, cond_retain, cond_forget, self.forget_share)

    def _draw(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in self.sources:
            return None, None
        pixels, labels, _ = self.sources[name].take(self.indices[name].draw(self.batch_size))
        x0 = pixels if pixels.is_floating_point() else to_unit_range(moved(pixels, self.device))  # latents, or bytes
        if self.horizontal_flip:
            x0 = half_mirrored(x0, self.generator)
        return x0, self.condition(labels)

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            **{name: indices.state_dict() for name, indices in self.indices.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"].cpu())
        for name, indices in self.indices.items():
            indices.load_state_dict(state_dict[name])


def encoded(
    pixels: UInt8[Tensor, "n c h w"],
    encode: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b ..."]],
    device: torch.device,
    batch_size: int = 16,
) -> Shaped[Tensor, "n ..."]:
    """What `encode` makes of images, or the images where it leaves them as they are."""
    parts = []
    for part in pixels.split(batch_size):
        images = to_unit_range(part.to(device))
        parts.append(encode(images))
        if parts[-1] is images:
            return pixels
    return torch.cat(parts)


def half_mirrored(images: Shaped[Tensor, "b c h w"], generator: torch.Generator) -> Shaped[Tensor, "b c h w"]:
    """Each image left to right with probability 1/2."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(moved(flip, images.device)[:, None, None, None], images.flip(-1), images)


def to_unit_range(pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """uint8 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(images: Float[Tensor, "b c h w"], name: str = "pictures") -> UInt8[Tensor, "b c h w"]:
    """[-1, 1] to uint8; what lies outside is cut off, as a picture file must.

    Raises NonFiniteError, which calls them `name`, if some are not finite: they would become black.
    """
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        hold = "holds" if broken == 1 else "hold"
        raise NonFiniteError(f"{broken} of {len(images)} {name} {hold} values that are not finite numbers")
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

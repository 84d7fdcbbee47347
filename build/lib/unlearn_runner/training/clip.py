"""A small CLIP, trained once on captioned pictures with open_clip's own loss, and cached."""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.cache import cached, write_json
from unlearn_runner.data.forget_retain import Dataset, LabelledImages
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import require_finite
from unlearn_runner.options import BatchSize, LearningRate, PositiveInt, Seed
from unlearn_runner.types import make_generator


@dataclass(frozen=True)
class ClipTraining:
    """The recipe. Each step has `groups` groups of pairs; the loss tells the pairs of a group apart.

    A group has one picture of every content under one of its captions: no two pairs of it fit each other, as those of a
    random batch of few captions would. With `corrupt` each picture is altered before it is looked at (`corrupted`): a
    CLIP of clean pictures alone can be led astray by what a policy that is rewarded by it draws.
    """

    corpus: Dataset
    max_steps: PositiveInt = 600
    groups: BatchSize = 8
    learning_rate: LearningRate = 1e-3
    corrupt: bool = True
    seed: Seed = 0


def trained_clip(
    clip: Clip,
    recipe: ClipTraining,
    key: dict[str, Any],
    cache_dir: Path,
    show: Callable[[int, dict[str, float]], None],
) -> Path:
    """The folder with the weights of `clip`, a fresh network that `key` describes, after training.

    `show` is called on the way with a step and its loss, images so far and seconds so far.
    """
    data = recipe.corpus.load()
    settings = {name: value for name, value in asdict(recipe).items() if name != "corpus"}
    key = {"version": 1, "network": key, "recipe": settings, "data": data.fingerprint}

    def make(folder: Path) -> None:
        _train(clip, recipe, data.spec.label_names, _pool(data), folder, show)

    return cached(cache_dir, "clips", key, make, lambda folder: copy.deepcopy(clip).load(folder))


def _pool(data: Any) -> LabelledImages:
    """Every captioned picture; those without a caption have nothing to say."""
    whole = LabelledImages(*(torch.cat(parts) for parts in zip(data.retain, data.forget, strict=True)))
    empty = [label for label, name in enumerate(data.spec.label_names) if not name]
    return whole.select(~torch.isin(whole.labels, torch.tensor(empty, dtype=torch.int64)))


def _train(
    clip: Clip,
    recipe: ClipTraining,
    captions: tuple[str, ...],
    pool: LabelledImages,
    folder: Path,
    show: Callable[[int, dict[str, float]], None],
) -> None:
    import open_clip

    started = time.perf_counter()
    device = clip.mean.device
    network = clip.network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.max_steps)
    loss_of = open_clip.ClipLoss()
    tokens = clip.tokenizer(list(captions)).to(device)
    rows_of = [torch.nonzero(pool.contents == content)[:, 0] for content in pool.contents.unique()]
    generator = make_generator(recipe.seed, "clip")
    for step in range(1, recipe.max_steps + 1):
        rows = torch.stack([_draw(part, recipe.groups, generator) for part in rows_of], dim=1)  # [groups, contents]
        pixels, labels, _ = pool.select(rows.flatten())
        images = to_unit_range(pixels)
        if recipe.corrupt:
            images = corrupted(images, generator)
        features = F.normalize(network.visual(clip.pixels(images.to(device))), dim=1)
        wanted, which = labels.unique(return_inverse=True)
        texts = network.encode_text(tokens[wanted.to(device)], normalize=True)[which.to(device)]
        loss = torch.stack(
            [
                loss_of(part, words, network.logit_scale.exp())
                for part, words in zip(features.split(len(rows_of)), texts.split(len(rows_of)), strict=True)
            ]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            network.logit_scale.clamp_(max=4.6052)  # ln 100, as open_clip's own training has it
        if step % 10 == 0 or step == recipe.max_steps:
            seconds = time.perf_counter() - started
            show(step, {"loss/clip": loss.item(), "images": step * rows.numel(), "seconds": seconds})
    network.requires_grad_(False).eval()
    try:
        require_finite(network, "CLIP")
    except NonFiniteError as error:
        raise ConfigurationError(
            f"training CLIP diverged ({error}); clip.training.learning_rate must be lower, it is "
            f"{recipe.learning_rate}."
        ) from error
    clip.save(folder)
    seen = pool.select(torch.randperm(len(pool), generator=generator)[:2000])
    write_json(folder / "report.json", {"zero_shot_accuracy": _zero_shot(clip, captions, pool, seen)})


def corrupted(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Images in [-1, 1], each moved, its strokes thickened or thinned, blurred, brightened, tinted or noised at random,
    as far as one can still tell what it shows."""
    b, c, h, w = images.shape

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((b, *shape), generator=generator)

    def some(share: float) -> Tensor:
        return torch.rand((b, 1, 1, 1), generator=generator) < share

    # moved: turned by up to 9 degrees, stretched, shifted
    angle, wide, high, right, down = (
        between(*limits) for limits in ((-0.15, 0.15), (0.85, 1.2), (0.85, 1.2), (-0.15, 0.15), (-0.15, 0.15))
    )
    rows = ((wide * angle.cos(), -wide * angle.sin(), right), (high * angle.sin(), high * angle.cos(), down))
    places = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    x = F.grid_sample(images / 2 + 0.5, F.affine_grid(places, images.shape, align_corners=False), align_corners=False)

    # strokes
    thick, thin = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 2, 1, 1)[..., :h, :w]
    x = torch.where(some(0.25), thick, torch.where(some(0.33), thin, x))

    # blurred
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(some(0.5), x.lerp(blurred, between(0.0, 1.0, 1, 1, 1)), x)

    # brightened or darkened, tinted, on a lighter ground
    x = x * between(0.4, 1.8, 1, 1, 1) * (1 + 0.15 * torch.randn((b, c, 1, 1), generator=generator))
    x = x + some(0.5) * between(0.0, 0.25, 1, 1, 1)

    # noised, coarsely or finely
    fine = 0.7 * torch.randn((b, 1, h, w), generator=generator) + 0.3 * torch.randn((b, c, h, w), generator=generator)
    noise = torch.where(some(0.5), fine, F.interpolate(fine[..., ::2, ::2], (h, w), mode="bilinear"))
    return (x + some(0.7) * between(0.0, 0.3, 1, 1, 1) * noise).clamp(0, 1) * 2 - 1


def _draw(rows: Int64[Tensor, "n"], count: int, generator: torch.Generator) -> Int64[Tensor, "{count}"]:
    return rows[torch.randint(len(rows), (count,), generator=generator)]


@torch.inference_mode()
def _zero_shot(clip: Clip, captions: tuple[str, ...], pool: LabelledImages, seen: LabelledImages) -> float:
    """Share of pictures whose nearest caption is one of their own content."""
    asked = torch.tensor([int(pool.contents[pool.labels == label][0]) for label in pool.labels.unique()])
    texts = clip.of_texts([captions[label] for label in pool.labels.unique()])
    images = torch.cat([clip.of_uint8(part.to(texts.device)) for part in seen.pixels.split(256)])
    return float((asked[(images @ texts.T).argmax(1).cpu()] == seen.contents).double().mean())

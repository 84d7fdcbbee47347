"""Whether a picture is like real images at all: an outlier detector in which no classifier has a say.

A classifier names whatever it is shown: it takes black squares for a digit with a confidence of 0.99. The local outlier
factor (Breunig et al. 2000) compares how near a picture lies to its nearest real images with how near those lie to
theirs, in features that do not depend on the classifier.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import cached
from unlearn_runner.data.forget_retain import LabelledImages
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.evaluation.features import efficientnet_lite0
from unlearn_runner.evaluation.metrics import Metric, Rows, first_distinct, share
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import Seed

VERSION = 1  # goes up when the same images would have other features
SMALL = 28  # pixels a side, up to which pixels and gradients do, and beyond which a network is needed
SEEN_AT = 96  # pixels a side at which the network sees pictures
ORIENTATIONS, CELL = 8, 4  # of the histograms of gradients


@dataclass(frozen=True)
class NoveltyRecipe:
    """How it is found out which pictures are outliers of real images.

    Args:
        max_images: real images that pictures are compared with, drawn with `seed`.
        neighbours: k of the local outlier factor.
        abstain: share of held-out real images that are taken for outliers; it sets the threshold.
    """

    max_images: int
    neighbours: int
    abstain: float
    seed: int


@final
class Novelty:
    """An outlier detector that real images have been shown.

    Args:
        real: features of real images.
        held_out: features of other real images, of which the share `recipe.abstain` shall be outliers.
    """

    def __init__(self, real: Float[Tensor, "n d"], held_out: Float[Tensor, "m d"], recipe: NoveltyRecipe):
        from sklearn.neighbors import LocalOutlierFactor

        neighbours = min(recipe.neighbours, len(real) - 1)
        self.detector = LocalOutlierFactor(neighbours, novelty=True).fit(real.numpy())
        self.threshold = float(np.quantile(self._factors(held_out), 1 - recipe.abstain))

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
        """The local outlier factor of each picture over the threshold: above 1 it is an outlier."""
        return torch.from_numpy(self._factors(appearance(images)) / self.threshold).float()

    def _factors(self, features: Float[Tensor, "n d"]) -> np.ndarray:
        return -self.detector.score_samples(features.numpy())


def fitted_novelty(
    images: LabelledImages, held_out: LabelledImages, recipe: NoveltyRecipe, key: dict[str, str], cache_dir: Path
) -> Novelty:
    """The detector for real images, each picture once; where none are held out a fifth of them sets the threshold.

    Features are kept in the cache under `key`, which says what the images are.
    """

    def make(folder: Path) -> None:
        real, others = (first_distinct(part, recipe.max_images, recipe.seed).pixels for part in (images, held_out))
        if not len(others):
            apart = torch.arange(len(real)) % 5 == 0
            real, others = real[~apart], real[apart]
        save_file({"real": appearance(real), "held_out": appearance(others)}, folder / "appearance.safetensors")

    def read(folder: Path) -> Novelty:
        features = load_file(folder / "appearance.safetensors")
        return Novelty(features["real"], features["held_out"], recipe)

    whole = {**key, "version": VERSION, "recipe": asdict(recipe)}
    return read(cached(cache_dir, "novelty", whole, make, read, together=True))


@final
class Outliers(Metric):
    """Share of samples that are outliers of all real retained images, in [0, 1].

    outliers_forget: of those under the forget condition: what is drawn instead of the forgotten content is nothing
    real. outliers_retain: of the others. Of held-out real images it is `abstain`; of the base's forget samples it is
    high where what is to be forgotten looks like no retained image. Arguments are those of `NoveltyRecipe`.
    """

    version = 1
    paired = True

    def __init__(
        self,
        max_images: Annotated[int, Ge(20), Le(100_000)] = 4000,
        neighbours: Annotated[int, Ge(1), Le(1000)] = 10,
        abstain: Annotated[float, Gt(0), Lt(0.5)] = 0.05,
        seed: Seed = 0,
    ):
        self.recipe = NoveltyRecipe(max_images, neighbours, abstain, seed)
        self._fitted: dict[str, Novelty] = {}  # by the data's fingerprint: base, result and oracle share one

    def measure(self, view: View) -> Rows:
        """The outlier factor of each sample over the threshold, set by set."""
        data = view.data
        if data.fingerprint not in self._fitted:
            key = {"data": data.fingerprint, "images": "retain"}
            fitted = fitted_novelty(data.retain, data.retain_test, self.recipe, key, view.cache_dir)
            self._fitted[data.fingerprint] = fitted
        detector = self._fitted[data.fingerprint]
        return {name: detector(judged.images) for name, judged in view.judged.items()}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        groups = samples.grouped(rows, per_class=False)
        return {f"outliers_{name}": share(factors > 1) for name, factors in groups.items()}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"detector": "local outlier factor of scikit-learn", "features": VERSION, **asdict(self.recipe)}


@torch.inference_mode()
def appearance(images: UInt8[Tensor, "n c h w"], batch_size: int = 64) -> Float[Tensor, "n d"]:
    """What pictures look like, in two halves of equal weight.

    Up to 28 pixels a side: the pixels, and histograms of oriented gradients (Dalal and Triggs 2005), of unit length:
    a blank or blurred picture is near to many images in its pixels, and far from all in its gradients. Larger ones:
    the last and a middle layer of EfficientNet-Lite0 (ImageNet), the latter in 4 x 4 places; each of unit length.
    """
    make = _of_small if max(images.shape[-2:]) <= SMALL else _of_large
    return torch.cat([make(to_unit_range(part.cpu())) for part in images.split(batch_size)])


def _of_small(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    return torch.cat([x.flatten(1) / math.sqrt(x[0].numel()), oriented_gradients(x)], 1)


def oriented_gradients(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Strength of edges by direction, averaged over overlapping cells; of unit length, less where there are few."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    angles = (2 * math.pi * number / ORIENTATIONS for number in range(ORIENTATIONS))
    edges = torch.cat([F.relu(across * math.cos(angle) + down * math.sin(angle)) for angle in angles], 1)
    cells = F.avg_pool2d(edges, CELL, stride=CELL // 2).flatten(1)
    return cells / (cells.norm(dim=1, keepdim=True) + 0.1)


def _of_large(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    seen = F.interpolate(x.expand(-1, 3, -1, -1), (SEEN_AT, SEEN_AT), mode="bicubic", antialias=True)
    network, middle = _efficientnet()
    last = network.extract_features(((seen + 1) * 127.5 - 127) / 128)  # scaled as it was trained
    pooled = (F.adaptive_avg_pool2d(part, size).flatten(1) for part, size in ((last, 1), (middle[0], 4)))
    return torch.cat([F.normalize(part, dim=1) for part in pooled], 1)


@cache
def _efficientnet() -> tuple[nn.Module, dict[int, Tensor]]:
    """EfficientNet-Lite0 and, after each pass, what its eleventh block gave."""
    network = efficientnet_lite0()
    middle: dict[int, Tensor] = {}
    network._blocks[10].register_forward_hook(lambda _, __, found: middle.update({0: found}))
    return network, middle

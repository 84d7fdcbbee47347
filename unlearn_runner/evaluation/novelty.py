"""Whether a picture is like real images at all: an outlier detector in which no classifier has a say.

A classifier names whatever it is shown: it takes black squares for a digit with a confidence of 0.99. Here a picture is
compared with its nearest real images, in features that do not depend on the classifier.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import cached, fingerprint
from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.distributed import in_shares
from unlearn_runner.evaluation.features import efficientnet_lite0
from unlearn_runner.evaluation.judge import NOTHING, Judge, Judged, contents_to_forget
from unlearn_runner.evaluation.metrics import Metric, Rows, first_distinct, share
from unlearn_runner.evaluation.view import RealSamples, Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import Seed
from unlearn_runner.rules import evaluation_options

VERSION = 4  # goes up when the same images would have other features, or the same features another verdict
SMALL = 28  # pixels a side, up to which pixels and gradients do, and beyond which a network is needed
SEEN_AT = 96  # pixels a side at which the network sees pictures
BLOCKS = (2, 4, 7, 10, 14)  # of the network, besides its last layer
ORIENTATIONS, CELL = 8, 4  # of the histograms of gradients
BY_EDGES = 0.2  # share of the outliers among real images that are found by their edges
ODD = 0.01  # share of real images, those farthest from the others, without a ball for precision
TINY = 2e-3  # of a distance: what rounding makes of 0, and a quarter of a grey level; without it a ball may be a point
FOUND = ("radii", "threshold", "least")  # what is fitted
LEAST = 10  # different real images without which nothing is called an outlier


@dataclass(frozen=True)
class NoveltyRecipe:
    """How it is found out which pictures are outliers of real images.

    Args:
        max_images: real images that pictures are compared with, drawn with `seed`; of the forgotten content a quarter
            as many.
        neighbours: k: around each real image lies a ball that reaches to its k-th nearest.
        abstain: share of real images that are to be outliers of the others; it sets the threshold.
    """

    max_images: Annotated[int, Ge(20), Le(20_000)] = 4000  # more take a distance matrix of gigabytes
    neighbours: Annotated[int, Ge(1), Le(1000)] = 5
    abstain: Annotated[float, Gt(0), Lt(0.5)] = 0.05
    seed: Seed = 0

    def __post_init__(self) -> None:
        evaluation_options.number_of_balls(self.neighbours, self.max_images)


class Placed(NamedTuple):
    """Where pictures are among real images."""

    outlying: Float[Tensor, "m"]  # how far each is from them, in units of the threshold: above 1 it is an outlier
    holding: Bool[Tensor, "m k"]  # which of the balls hold it


@final
@dataclass(frozen=True)
class RealImages:
    """Balls around the looks of real images, each as far as to the image's k-th nearest other one.

    A picture is an outlier if it lies in no ball, where none reaches farther than the median one, and all are scaled;
    or if its edges are weaker than those of the real images nearest to it: so are the mean's of similar images. Of the
    real images a share `abstain` would be outliers of the others, a fifth of these by their edges. Without the cap a
    single odd image, far from all others, has a ball that takes in noise.
    """

    looks: Float[Tensor, "n a"]
    radii: Float[Tensor, "n"]  # without cap and scale
    threshold: Float[Tensor, ""]  # the scale
    least: Float[Tensor, ""]  # strength of edges beside that of the nearest images
    neighbours: int

    @classmethod
    def fitted(cls, looks: Float[Tensor, "n a"], neighbours: int, abstain: float) -> "RealImages":
        neighbours = min(neighbours, len(looks) - 1)
        between = _distances(looks, looks).fill_diagonal_(math.inf)
        radii = between.kthvalue(neighbours, dim=1).values
        threshold = (between / _capped(radii)).amin(1).quantile(1 - abstain * (1 - BY_EDGES))
        least = _edges_beside(looks, looks, between, neighbours).quantile(abstain * BY_EDGES, interpolation="lower")
        return cls(looks, radii, threshold, least, neighbours)

    def place(self, looks: Float[Tensor, "m a"]) -> Placed:
        """Whether pictures are outliers, and which of the balls, without cap and scale, hold them; none an outlier by
        its edges.

        The share `ODD` of the balls, the largest, is left out: one odd image's takes in noise. (For its realism score
        1904.06991 leaves out half of them.)
        """
        between = _distances(looks, self.looks)
        weak = (self.least - _edges_beside(looks, self.looks, between, self.neighbours)).clamp(max=80).exp()
        outlying = torch.maximum((between / _capped(self.radii)).amin(1) / self.threshold, weak)
        kept = self.radii <= self.radii.quantile(1 - ODD, interpolation="higher")
        return Placed(outlying, (between[:, kept] <= self.radii[kept]) & (weak <= 1)[:, None])


def _distances(looks: Float[Tensor, "m a"], others: Float[Tensor, "n a"]) -> Float[Tensor, "m n"]:
    return torch.cdist(looks[:, :-1], others[:, :-1]).clamp(min=TINY)


def _edges_beside(
    looks: Float[Tensor, "m a"], others: Float[Tensor, "n a"], between: Float[Tensor, "m n"], neighbours: int
) -> Float[Tensor, "m"]:
    """The logarithm of the strength of a picture's edges, less the mean of its nearest others', in units of their
    spread, which a tenth is added to.

    Others count by the inverse fourth power of their distance in the mean: a copy is compared with its original alone.
    """
    distances, nearest = between.topk(min(2 * neighbours, between.shape[1] - 1), dim=1, largest=False)
    own, usual = (part[:, -1].clamp(min=1e-6).log() for part in (looks, others))
    usual, weights = usual[nearest], (distances[:, :1] / distances) ** 4
    mean = (usual * weights).sum(1) / weights.sum(1)
    return (own - mean) / (usual.std(1, correction=0) + 0.1)


def _capped(radii: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return radii.clamp(max=float(radii.quantile(0.5)))


class Novelty(NamedTuple):
    """Real images of a dataset: those that are kept, and those of all contents, the forgotten one among them."""

    retained: RealImages
    contents: RealImages
    recipe: NoveltyRecipe
    mirrored: bool  # mirror images among them


def novelty_of(data: ForgetRetain, recipe: NoveltyRecipe, cache_dir: Path) -> Novelty | None:
    """The outlier detector of a dataset, each picture once; None where too few different images are kept.

    Where the model sees images mirrored, their mirror images are real, too: both of each if there is room, else one.

    It is kept in the cache: to find the balls takes a comparison of all real images with each other.
    """

    def make(folder: Path) -> None:
        def looks(images: LabelledImages, most: int) -> Float[Tensor, "n a"]:
            pixels = first_distinct(images, most, recipe.seed).pixels
            if mirrored and 2 * len(pixels) <= most:
                return appearance(torch.cat([pixels, pixels.flip(-1)]))
            return appearance(data.as_trained(pixels))

        retain = looks(data.retain, recipe.max_images)
        forget = looks(contents_to_forget(data), max(2, recipe.max_images // 4))
        tensors = {"retain": retain, "forget": forget}
        if len(retain) >= LEAST:
            for name, looks in (("retained", retain), ("contents", torch.cat([retain, forget]))):
                found = RealImages.fitted(looks, recipe.neighbours, recipe.abstain)
                tensors |= {f"{name}/{part}": getattr(found, part) for part in FOUND}
        save_file(tensors, folder / "real.safetensors")

    def read(folder: Path) -> Novelty | None:
        tensors = load_file(folder / "real.safetensors")
        retain = tensors["retain"]
        if len(retain) < LEAST:
            return None

        def of(name: str, looks: Float[Tensor, "n a"]) -> RealImages:
            found = {part: tensors[f"{name}/{part}"] for part in FOUND}
            return RealImages(looks, neighbours=min(recipe.neighbours, len(looks) - 1), **found)

        contents = torch.cat([retain, tensors["forget"]])
        return Novelty(of("retained", retain), of("contents", contents), recipe, mirrored)

    mirrored = data.spec.horizontal_flip
    key = {"data": data.fingerprint, "version": VERSION, "recipe": asdict(recipe)} | _mirrored(mirrored)
    return read(cached(cache_dir, "novelty", key, make, read, together=True))


def _mirrored(mirrored: bool) -> dict[str, bool]:
    """Part of a key; nothing where nothing is mirrored, so that what was kept before mirroring counted still fits."""
    return {"mirrored": True} if mirrored else {}


def abstaining(judge: Judge, data: ForgetRetain, recipe: NoveltyRecipe | None, cache_dir: Path) -> Judge:
    """The judge that abstains on outliers; itself where there is no recipe for it, or too few images."""
    novelty = None if recipe is None else novelty_of(data, recipe, cache_dir)
    return judge if novelty is None else AbstainingJudge(judge, novelty)


@final
class AbstainingJudge(Judge):
    """A judge that calls a picture nothing where it is an outlier of the real images of all contents, and where the
    judge itself does.
    """

    def __init__(self, judge: Judge, novelty: Novelty):
        self.judge, self.novelty, self.device = judge, novelty, judge.device

    def __call__(self, images: UInt8[Tensor, "n c h w"], batch_size: int = 128) -> Judged:
        outlying, looks = in_shares(self._novelty_of, images)
        judged = self.judge(images, batch_size)
        outlying = outlying if judged.outlying is None else torch.maximum(outlying, judged.outlying)
        return replace(judged, outlying=outlying, appearance=looks)

    def _novelty_of(self, images: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
        looks = appearance(images)
        return self.novelty.contents.place(looks).outlying, looks

    def features_of(self, images: UInt8[Tensor, "n c h w"]) -> Judged:
        return self.judge.features_of(images)

    @property
    def num_features(self) -> int:
        return self.judge.num_features

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.judge.fingerprint, VERSION, self._recipe()])

    def _recipe(self) -> dict[str, Any]:
        return asdict(self.novelty.recipe) | _mirrored(self.novelty.mirrored)

    def doubts(self) -> list[str]:
        return self.judge.doubts()

    def provenance(self) -> dict[str, Any]:
        return {**self.judge.provenance(), "abstains": {"version": VERSION, **self._recipe()}}


@final
class Outliers(Metric):
    """What is drawn, against all real retained images, in features that are not the judge's (`appearance`).

    outliers_forget: share of the samples under the forget condition that are outliers (`RealImages`), in [0, 1]: what
    is drawn instead of the forgotten content is nothing real. outliers_retain: of the others. Of real images it is
    `abstain`; of the base's forget samples it is high where what is to be forgotten looks like no retained image.

    precision_forget: share that lies among real images (1904.06991), within the distance of one to its k-th nearest;
    density_forget: the mean number of such balls that hold a sample, over k (2002.09797), >= 0 and 1 for real images;
    coverage_forget: share of real images whose ball holds a sample (2002.09797): low where only one content is drawn.
    """

    version = 3
    needs = ("novelty",)
    paired = True
    without_interval = ("coverage_forget",)  # samples that are taken twice cover less

    def measure(self, view: View) -> Rows:
        """Of each sample, set by set: how far it is an outlier, its density, and which balls hold it."""
        return {name: _rows(judged, view.judge.novelty.retained) for name, judged in view.judged.items()}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        groups = samples.grouped(rows, per_class=False)
        outliers = {f"outliers_{name}": share(part[:, 0] > 1) for name, part in groups.items()}
        return outliers | _among_real(groups["forget"])

    def floor(self, real: RealSamples) -> dict[str, float]:
        """Of held-out retained images, for the balls are those of training images: what is to be drawn instead of the
        forgotten content has no more precision, and the judge abstains on no fewer. Fewer images cover less.
        """
        if real.held_out is None:
            return {}
        rows = _rows(real.held_out, real.judge.novelty.retained)
        outliers = share(rows[:, 0] > 1)
        scores = {"outliers_forget": outliers, "outliers_retain": outliers, **_among_real(rows)}
        scores["nothing_rate"] = share(real.held_out.contents == NOTHING)
        if len(real.held_out) < real.num_samples:
            del scores["coverage_forget"]
        return scores

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"features": VERSION}  # the rest is the judge's


def _rows(judged: Judged, real: RealImages) -> Float[Tensor, "n m"]:
    """Of each picture how far it is an outlier, its density, and which balls hold it."""
    outlying, holding = real.place(judged.appearance)
    density = holding.sum(1) / real.neighbours
    return torch.cat([outlying[:, None], density[:, None], holding.float()], 1)


def _among_real(rows: Float[Tensor, "n m"]) -> dict[str, float]:
    density, inside = rows[:, 1], rows[:, 2:] > 0
    return {
        "precision_forget": share(density > 0),
        "density_forget": float(density.double().mean()),
        "coverage_forget": share(inside.any(0)),
    }


@torch.inference_mode()
def appearance(images: UInt8[Tensor, "n c h w"], batch_size: int = 64) -> Float[Tensor, "n a"]:
    """What pictures look like, in parts of equal weight; and last, which no distance sees, the strength of their edges:
    the root mean square difference of neighbouring pixels, on the scale of [-1, 1].

    Up to 28 pixels a side: the pixels, and histograms of oriented gradients (Dalal and Triggs 2005), of unit length:
    a blank or blurred picture is near to many images in its pixels, and far from all in its gradients. Larger ones:
    the means of the last layer and of five blocks of EfficientNet-Lite0 (ImageNet), each of unit length.
    """
    make = _of_small if max(images.shape[-2:]) <= SMALL else _of_large
    parts = [to_unit_range(part.cpu()) for part in images.split(batch_size)]
    return torch.cat([torch.cat([make(part), _strength_of_edges(part)[:, None]], 1) for part in parts])


def _strength_of_edges(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return (across.square().flatten(1).mean(1) + down.square().flatten(1).mean(1)).sqrt()


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
    return torch.cat([F.normalize(part.mean((2, 3)), dim=1) for part in (last, *middle.values())], 1)


@cache
def _efficientnet() -> tuple[nn.Module, dict[int, Tensor]]:
    """EfficientNet-Lite0 and, after each pass, what BLOCKS of it gave."""
    network = efficientnet_lite0()
    middle: dict[int, Tensor] = {}
    for number in BLOCKS:
        network._blocks[number].register_forward_hook(
            lambda _, __, found, number=number: middle.update({number: found})
        )
    return network, middle

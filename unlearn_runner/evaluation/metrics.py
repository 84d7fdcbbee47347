"""What is measured, each metric a small class with its version and provenance; here those on samples."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unlearn_runner.data.forget_retain import LabelledImages, contents_of_labels, is_to_forget
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.evaluation.judge import NOTHING, Judged
from unlearn_runner.evaluation.view import Group, Need, RealSamples, Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import Features, PositiveInt, Seed
from unlearn_runner.rules import evaluation_options

Rows: TypeAlias = dict[str, Tensor]
MinSamples: TypeAlias = Annotated[int, Ge(2), Le(10_000_000)]
ALONE = {"sync_on_compute": False}  # torchmetrics would add up what several processes have, and here all have all


class Metric(ABC):
    """Scores by key, without the prefix `eval/`, of one model; unlearn_runner/catalogue.py has a line for each.

    Where the values are a mean, a rate or any other number of single samples or images, `measure` returns these, so
    that they can be redrawn for intervals; scores of whole sets of samples are made of the samples by `score` alone.
    """

    version: ClassVar[int]  # goes up when the code makes other numbers: a part of cache keys and of the provenance
    needs: Sequence[Need] = ()  # where one is not met the scores are left out; a literal tuple, read without importing
    held_out: Mapping[str, str] = MappingProxyType({})  # by score, the set of images without which it is left out
    per_class: bool = False  # whether each condition is scored on its own, too
    paired: bool = False  # whether rows are the samples', by set: they are redrawn together for intervals
    without_interval: Sequence[str] = ()  # patterns of its keys whose spread is not to be had by redrawing samples

    def least(self, num_features: int) -> int:
        """Fewer samples in a group are refused, and groups with fewer references left out."""
        return 1

    @abstractmethod
    def measure(self, view: View) -> Rows:
        """Tables by name with a row for each sample or image, in all processes at once; {} where there are none."""

    @abstractmethod
    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        """The scores of these samples and rows, or of a choice of them for intervals."""

    def floor(self, real: RealSamples) -> dict[str, float]:
        """What real images in the place of samples score, where they are enough to tell: no model should be better.

        Asked of metrics that need `references` or `novelty`.
        """
        return {}

    @abstractmethod
    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        """What its numbers depend on beyond the samples and the judge, for this kind of model."""


def measure_images(
    measure: Callable[[Float[Tensor, "b c h w"], Shaped[Tensor, "b ..."] | None], Tensor],
    images: LabelledImages,
    conditional: bool,
    count: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Tensor | None:
    """A row of `measure(x0, cond)` for each of up to `count` different images, batch by batch; None without images."""
    chosen = first_distinct(images, count, seed)
    if not len(chosen):
        return None
    rows = []
    for part in torch.arange(len(chosen)).split(batch_size):
        pixels, labels, _ = chosen.select(part)
        rows.append(measure(to_unit_range(pixels.to(device)), labels.to(device) if conditional else None))
    return torch.cat(rows).cpu()


def first_distinct(images: LabelledImages, count: int, seed: int) -> LabelledImages:
    """Up to `count` images in a random order that depends on the seed alone, each picture once."""
    order = np.random.default_rng(seed).permutation(len(images))
    seen, rows = set(), []
    for row in order.tolist():
        picture = images.pixels[row].numpy().tobytes()
        if picture not in seen:
            seen.add(picture)
            rows.append(row)
        if len(rows) == count:
            break
    return images.select(torch.tensor(rows, dtype=torch.int64))


@final
class Rates(Metric):
    """What the judge takes the samples for; shares in [0, 1].

    forget_rate: samples under the forget conditions taken for any content to forget. Where several are to be forgotten,
    a sample under the condition of one that shows another one counts as not forgotten. per_class/forget_rate/<content>:
    the same of the samples under the conditions of each of these contents, where there are several; forget_rate is
    their mean. How many of them show this very content, per_class/accuracy/<class> says. restored_rate: the same
    samples taken for the clean content of that condition (absent where there is none). nothing_rate: those on which it
    abstains, for they are like no real image of any content (absent where it cannot: 0 would say that they were looked
    at). other_rate: all others of them; these four make up 1.
    retain_accuracy: samples under the other conditions taken for what their condition names, and
    per_class/accuracy/<class>. An unconditional model has no condition to be right about: then forget_rate,
    nothing_rate and other_rate, over all samples.
    """

    version = 2

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        spec, contents = samples.spec, samples.forget.samples.contents
        kinds = {"forget_rate": is_to_forget(spec, contents)}
        if samples.forget.samples.outlying is not None:
            kinds["nothing_rate"] = contents == NOTHING
        if spec.restored_content is not None and spec.label_names is not None:
            kinds["restored_rate"] = contents == spec.restored_content
        scores = {name: share(rows) for name, rows in kinds.items()}
        scores["other_rate"] = share(~torch.stack([*kinds.values()]).any(0))
        for name, shown in samples.apart().items():
            scores[f"per_class/forget_rate/{name}"] = share(is_to_forget(spec, shown))
        if samples.retain_labels is not None:
            right = samples.retain.samples.contents == contents_of_labels(spec, samples.retain_labels)
            scores["retain_accuracy"] = share(right)
        for name, group in samples.per_class.items():
            right = group.samples.contents == contents_of_labels(spec, torch.tensor(samples.label_of[name]))
            scores[f"per_class/accuracy/{name}"] = share(right)
        return scores

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"kind": "share of samples by the most likely content, unless the judge abstains"}


@final
class FID(Metric):
    """Frechet distance between features of samples and of real images (1706.08500), >= 0.

    Biased upwards at small n, so compare at equal n only. fid_forget is the distance to the forget images: it
    should rise.

    `against="base"`: fid_base_<group>, the distance to the base model's samples from the same noise instead: 0 for a
    model that was not changed, whatever the base is worth, and lower than it would be from other noise.
    """

    version = 1

    def __init__(
        self, per_class: bool = False, min_samples: MinSamples = 100, against: Literal["images", "base"] = "images"
    ):
        self.per_class, self.min_samples, self.against = per_class, min_samples, against
        self.needs = ("references",) if against == "images" else ()
        self._by_reference: dict[int, tuple[Judged, Any]] = {}  # the statistics of real images are taken once

    def least(self, num_features: int) -> int:
        """At least `min_samples`, and more than there are features, or their covariance is singular."""
        return max(self.min_samples, num_features + 1)

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        if self.against == "images":
            groups = ((name, group.samples, group.reference) for name, group in compared(samples, self))
            return {_key("fid", name): self._distance(*pair) for name, *pair in groups}
        groups = ((name, group.samples, group.before) for name, group in samples.groups(self.per_class).items())
        return {_key("fid_base", name): self._distance(*pair) for name, *pair in groups if pair[1] is not None}

    def floor(self, real: RealSamples) -> dict[str, float]:
        """Where the images are fewer, about what so many samples would have: between two samples of n and m of one
        distribution it goes with 1/n + 1/m.
        """
        scores = {}
        for name, (images, reference, _) in compared(real.samples, self):
            at, there = (1 / n + 1 / len(reference) for n in (real.num_samples, len(images)))
            scores[_key("fid", name)] = self._distance(images, reference) * at / there
        return scores

    def _distance(self, samples: Judged, reference: Judged) -> float:
        metric = self._prepared(reference)
        metric.update(samples.features.double(), real=False)
        distance = float(metric.compute())
        metric.reset()
        return distance

    def _prepared(self, reference: Judged) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        if id(reference) in self._by_reference:
            return self._by_reference[id(reference)][1]
        d = reference.features.shape[1]
        metric = FrechetInceptionDistance(feature=_Features(d), reset_real_features=False, **ALONE)
        metric.set_dtype(torch.float64)
        metric.update(reference.features.double(), real=True)
        if self.against == "images":
            self._by_reference[id(reference)] = (reference, metric)  # kept, so that no other has its id
        return metric

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        own = {"library": "torchmetrics", "per_class": self.per_class, "min_samples": self.min_samples}
        return own if self.against == "images" else own | {"reference": "base samples from the same noise"}


@final
class KID(Metric):
    """Kernel distance (squared MMD, cubic kernel, 1801.01401) of the same features; unbiased, may be below 0.

    The mean over `subsets` random subsets of `subset_size` features, drawn with a seed of their own: much of its spread
    is theirs, so it has no interval.
    """

    version = 1
    needs = ("references",)
    without_interval = ("kid_*", "per_class/kid/*")

    def __init__(
        self,
        per_class: bool = False,
        min_samples: MinSamples = 100,
        subset_size: MinSamples = 100,
        subsets: Annotated[int, Ge(1), Le(10_000)] = 20,
        seed: Seed = 0,
    ):
        evaluation_options.size_of_subsets(subset_size, min_samples)
        self.per_class, self.min_samples = per_class, min_samples
        self.subset_size, self.subsets, self.seed = subset_size, subsets, seed

    def least(self, num_features: int) -> int:
        return self.min_samples

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        def distance(group: Group) -> float:
            d = group.samples.features.shape[1]
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its memory
                torch.manual_seed(self.seed)  # torchmetrics draws its subsets from the global generator
                metric = KernelInceptionDistance(
                    feature=_Features(d), subsets=self.subsets, subset_size=self.subset_size, **ALONE
                )
                metric.update(group.reference.features, real=True)
                metric.update(group.samples.features, real=False)
                return float(metric.compute()[0])

        return {_key("kid", name): distance(group) for name, group in compared(samples, self)}

    def floor(self, real: RealSamples) -> dict[str, float]:
        return self.score(real.whole(), {})

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "library": "torchmetrics",
            "per_class": self.per_class,
            "min_samples": self.min_samples,
            "subset_size": self.subset_size,
            "subsets": self.subsets,
            "seed": self.seed,
        }


@final
class CMMD(Metric):
    """Squared MMD of CLIP embeddings of length 1, Gaussian kernel of sigma 10, times 1000 (2401.09603, section 4).

    The unbiased estimate, which may be below 0; the paper's released code keeps each embedding's kernel with itself,
    which adds at most 20 / n. A kernel needs no covariance, so that there may be fewer samples than features.

    The paper has ViT-L/14 at 336 px; numbers of another CLIP do not compare with its. Of features that are not CLIP's
    neither sigma nor the factor means anything: nothing is measured unless `features` is open_clip, or None (then of
    whatever there is). Up to `max_references` real images, drawn with a seed.
    """

    version = 1
    needs = ("references",)
    SIGMA, SCALE = 10.0, 1000.0

    def __init__(
        self,
        features: Features | None = None,
        per_class: bool = False,
        min_samples: MinSamples = 100,
        max_references: Annotated[int, Ge(2), Le(100_000)] = 10_000,
        seed: Seed = 0,
    ):
        self.measures = features in (None, "open_clip")
        self.needs = ("references",) if self.measures else ()
        self.per_class, self.min_samples = per_class, min_samples
        self.max_references, self.seed = max_references, seed
        self._by_reference: dict[int, tuple[Judged, Tensor, float]] = {}  # with what they are among themselves

    def least(self, num_features: int) -> int:
        return self.min_samples if self.measures else 1

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        if not self.measures:
            return {}
        return {_key("cmmd", name): self._distance(group) for name, group in compared(samples, self)}

    def floor(self, real: RealSamples) -> dict[str, float]:
        return self.score(real.whole(), {})

    def _distance(self, group: Group) -> float:
        drawn = F.normalize(group.samples.features.double(), dim=1)
        real, among_real = self._prepared(group.reference)
        across = self._kernel_sum(drawn, real) / (len(drawn) * len(real))
        return self.SCALE * (self._among(drawn) + among_real - 2 * across)

    def _prepared(self, reference: Judged) -> tuple[Tensor, float]:
        if id(reference) not in self._by_reference:
            order = np.random.default_rng(self.seed).permutation(len(reference))[: self.max_references]
            real = F.normalize(reference.features[order].double(), dim=1)
            self._by_reference[id(reference)] = (reference, real, self._among(real))  # kept: no other has its id
        return self._by_reference[id(reference)][1:]

    def _among(self, x: Float[Tensor, "n d"]) -> float:
        """The mean kernel of two different embeddings."""
        return (self._kernel_sum(x, x) - len(x)) / (len(x) * (len(x) - 1))

    def _kernel_sum(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
        """Of length 1, their squared distance is 2 - 2 x.y."""
        return sum(float(((part @ y.T - 1) / self.SIGMA**2).exp().sum()) for part in x.split(1024))

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "per_class": self.per_class,
            "min_samples": self.min_samples,
            "max_references": self.max_references,
            "seed": self.seed,
        }


@final
class PrecisionRecall(Metric):
    """Improved precision and recall (1904.06991), in [0, 1], of the samples under the retained conditions.

    precision_retain: samples that lie among real images, within the distance of one of them to its `neighbours`-th
    nearest; recall_retain: real images that lie among samples. As many real images as samples, drawn with a seed. Where
    samples are taken twice, their neighbours are nearer: recall has no interval.
    """

    version = 1
    needs = ("references",)
    without_interval = ("recall_retain",)

    def __init__(self, min_samples: MinSamples = 100, neighbours: PositiveInt = 3, seed: Seed = 0):
        evaluation_options.number_of_neighbours(neighbours, min_samples)
        self.min_samples, self.neighbours, self.seed = min_samples, neighbours, seed

    def least(self, num_features: int) -> int:
        return self.min_samples

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        group = dict(compared(samples, self)).get("retain")
        if group is None:
            return {}
        drawn, real = group.samples.features, group.reference.features
        chosen = np.random.default_rng(self.seed).permutation(len(real))[: len(drawn)]
        found = prc_features_to_metric(drawn, real[chosen], prc_neighborhood=self.neighbours, verbose=False)
        return {f"{name}_retain": float(found[name]) for name in ("precision", "recall")}

    def floor(self, real: RealSamples) -> dict[str, float]:
        return self.score(real.whole(), {})

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "library": "torch-fidelity",
            "min_samples": self.min_samples,
            "neighbours": self.neighbours,
            "seed": self.seed,
        }


@final
class IS(Metric):
    """Inception score (1606.03498) from the classifier's probabilities, in [1, number of contents], or from the
    extractor's where it has logits of its own.

    High where each sample is taken for one content and the samples cover many: diversity of what is recognised,
    not closeness to any image.
    """

    version = 1

    def __init__(self, per_class: bool = False, splits: PositiveInt = 1, seed: Seed = 0):
        self.per_class, self.splits, self.seed = per_class, splits, seed

    def measure(self, view: View) -> Rows:
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        from torchmetrics.image.inception import InceptionScore

        def score(group: Group) -> float:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its memory, and of the deviation over a single split
                torch.manual_seed(self.seed)  # torchmetrics shuffles with the global generator
                metric = InceptionScore(_Features(group.samples.is_logits.shape[1]), splits=self.splits, **ALONE)
                metric.update(group.samples.is_logits)
                return float(metric.compute()[0])

        return {_key("is", name): score(group) for name, group in samples.groups(self.per_class).items()}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"library": "torchmetrics", "per_class": self.per_class, "splits": self.splits, "seed": self.seed}


@final
class SSIM(Metric):
    """Structural similarity between each sample and the BASE model's sample from the same noise and condition.

    In [-1, 1], mean over samples; 1 for the base itself. ssim_retain says how little unlearning moved the
    pictures that should stay; ssim_forget how much it changed those that should go. Nothing is compared with
    real images. Window: a Gaussian of standard deviation `sigma` pixels, data range 2 (images in [-1, 1]).
    """

    version = 1
    paired = True

    def __init__(self, per_class: bool = False, sigma: Annotated[float, Ge(0.1), Le(10)] = 1.0):
        self.per_class, self.sigma = per_class, sigma

    def measure(self, view: View) -> Rows:
        """The similarity of each sample, set by set; of the base's own, 1."""
        base = view.base_samples
        return {
            name: torch.ones(len(judged)) if base is None else self.compare(judged, base[name])
            for name, judged in view.judged.items()
        }

    def compare(self, samples: Judged, before: Judged) -> Float[Tensor, "n"]:
        """The similarity of samples and the base model's, row by row."""
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        pair = (to_unit_range(judged.images) for judged in (samples, before))
        return ssim(*pair, sigma=self.sigma, data_range=2.0, reduction="none")

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {
            _key("ssim", name): float(table.double().mean())
            for name, table in samples.grouped(rows, self.per_class).items()
        }

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "library": "torchmetrics",
            "per_class": self.per_class,
            "sigma": self.sigma,
            "reference": "base samples from the same noise",
        }


def share(mask: Tensor) -> float:
    """Mean of a boolean mask."""
    return float(mask.double().mean())


def _key(metric: str, group: str) -> str:
    return f"per_class/{metric}{group}" if group.startswith("/") else f"{metric}_{group}"


def compared(samples: Samples, metric: Metric) -> list[tuple[str, Group]]:
    """The groups with enough samples and enough references for the metric."""
    least = metric.least(samples.forget.samples.features.shape[1])
    return [
        (name, group)
        for name, group in samples.groups(metric.per_class).items()
        if group.reference is not None and min(len(group.reference), len(group.samples)) >= least
    ]


@final
class _Features(nn.Module):
    """Stands where torchmetrics expects a feature extractor: the features are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features

"""What is measured on samples, each metric a small class with its provenance; all from one set of samples."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from unlearn_runner.data.forget_retain import DataSpec
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import Judged


class Group(NamedTuple):
    """Samples that belong together, with what they are compared with."""

    samples: Judged
    reference: Judged | None  # real images; None where there are none
    before: Judged | None  # the base model's samples from the same noise, row by row; None for the base itself


class Samples(NamedTuple):
    """Everything that one evaluation drew, judged once.

    `forget`: samples under the conditions of the forget images; `retain`: under all others. An unconditional
    model has one pool of samples, which is both. `per_class`: under each condition, by its name; the reference
    of a class is its clean images.
    """

    spec: DataSpec
    forget: Group
    retain: Group
    per_class: dict[str, Group]
    retain_labels: Tensor | None  # the condition of each retain sample
    label_of: dict[str, int]

    def groups(self, per_class: bool) -> dict[str, Group]:
        """Groups by the ending of the metric's key."""
        named = {"forget": self.forget, "retain": self.retain}
        return named | ({f"/{name}": group for name, group in self.per_class.items()} if per_class else {})


class Metric(ABC):
    """Scores by key, without the prefix `eval/`. Called with the samples of one evaluation."""

    needs_references: bool  # whether it compares samples with real images

    @abstractmethod
    def __call__(self, samples: Samples) -> dict[str, float]: ...

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What this metric's numbers depend on beyond the samples and the classifier."""


@final
class Rates(Metric):
    """What a classifier takes the samples for; shares in [0, 1].

    forget_rate: samples under the forget condition taken for the forgotten content. restored_rate: the same
    samples taken for the clean content of that condition (absent where there is none). retain_accuracy: samples
    under the other conditions taken for what their condition names, and per_class/accuracy/<class>. An
    unconditional model has no condition to be right about: then only forget_rate, over all samples.
    """

    needs_references = False

    def __call__(self, samples: Samples) -> dict[str, float]:
        spec, contents = samples.spec, samples.forget.samples.contents
        scores = {"forget_rate": share(contents == spec.forget_content)}
        if spec.restored_content is not None and spec.label_names is not None:
            scores["restored_rate"] = share(contents == spec.restored_content)
        if samples.retain_labels is not None:
            scores["retain_accuracy"] = share(samples.retain.samples.contents == samples.retain_labels)
        for name, group in samples.per_class.items():
            right = group.samples.contents == samples.label_of[name]
            scores[f"per_class/accuracy/{name}"] = share(right)
        return scores

    def provenance(self) -> dict[str, Any]:
        return {"kind": "share of samples by the classifier's most likely content"}


@final
class FID(Metric):
    """Frechet distance between the classifier's features of samples and of real images (1706.08500), >= 0.

    Biased upwards at small n, so compare at equal n only; groups with fewer than `min_samples` samples or
    references get no score. fid_forget is the distance to the forget images: it should rise.
    """

    needs_references = True

    def __init__(self, per_class: bool = False, min_samples: int = 100):
        self.per_class, self.min_samples = per_class, _at_least_two("fid", min_samples)

    def __call__(self, samples: Samples) -> dict[str, float]:
        from torchmetrics.image.fid import FrechetInceptionDistance

        def distance(group: Group) -> float:
            d = group.samples.features.shape[1]
            metric = FrechetInceptionDistance(feature=_Features(d)).set_dtype(torch.float64)
            metric.update(group.reference.features.double(), real=True)
            metric.update(group.samples.features.double(), real=False)
            return float(metric.compute())

        groups = _comparable(samples.groups(self.per_class), self.min_samples)
        return {_key("fid", name): distance(group) for name, group in groups.items()}

    def provenance(self) -> dict[str, Any]:
        return {"library": "torchmetrics", "min_samples": self.min_samples, "reference": "training images"}


@final
class KID(Metric):
    """Kernel distance (squared MMD, cubic kernel, 1801.01401) of the same features; unbiased, may be below 0.

    The mean over `subsets` random subsets of `subset_size` features, drawn with a seed of their own.
    """

    needs_references = True

    def __init__(
        self,
        per_class: bool = False,
        min_samples: int = 100,
        subset_size: int = 100,
        subsets: int = 20,
        seed: int = 0,
    ):
        if subset_size > min_samples:
            raise ConfigurationError(
                f"evaluation.metrics.kid.subset_size must be at most its min_samples ({min_samples}), "
                f"got {subset_size}."
            )
        self.per_class, self.min_samples = per_class, _at_least_two("kid", min_samples)
        self.subset_size, self.subsets, self.seed = subset_size, subsets, seed

    def __call__(self, samples: Samples) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        def distance(group: Group) -> float:
            d = group.samples.features.shape[1]
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its memory
                torch.manual_seed(self.seed)  # torchmetrics draws its subsets from the global generator
                metric = KernelInceptionDistance(
                    feature=_Features(d), subsets=self.subsets, subset_size=self.subset_size
                )
                metric.update(group.reference.features, real=True)
                metric.update(group.samples.features, real=False)
                return float(metric.compute()[0])

        groups = _comparable(samples.groups(self.per_class), self.min_samples)
        return {_key("kid", name): distance(group) for name, group in groups.items()}

    def provenance(self) -> dict[str, Any]:
        return {
            "library": "torchmetrics",
            "subset_size": self.subset_size,
            "subsets": self.subsets,
            "seed": self.seed,
            "reference": "training images",
        }


@final
class IS(Metric):
    """Inception score from the classifier's probabilities (1606.03498), in [1, number of contents].

    High where each sample is taken for one content and the samples cover many: diversity of what is recognised,
    not closeness to any image.
    """

    needs_references = False

    def __init__(self, per_class: bool = False, splits: int = 1, seed: int = 0):
        if splits < 1:
            raise ConfigurationError(f"evaluation.metrics.is.splits must be at least 1, got {splits}.")
        self.per_class, self.splits, self.seed = per_class, splits, seed

    def __call__(self, samples: Samples) -> dict[str, float]:
        from torchmetrics.image.inception import InceptionScore

        def score(group: Group) -> float:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its memory, and of the deviation over a single split
                torch.manual_seed(self.seed)  # torchmetrics shuffles with the global generator
                metric = InceptionScore(feature=_Features(group.samples.logits.shape[1]), splits=self.splits)
                metric.update(group.samples.logits)
                return float(metric.compute()[0])

        return {_key("is", name): score(group) for name, group in samples.groups(self.per_class).items()}

    def provenance(self) -> dict[str, Any]:
        return {"library": "torchmetrics", "splits": self.splits, "seed": self.seed}


@final
class SSIM(Metric):
    """Structural similarity between each sample and the BASE model's sample from the same noise and condition.

    In [-1, 1], mean over samples; 1 for the base itself. ssim_retain says how little unlearning moved the
    pictures that should stay; ssim_forget how much it changed those that should go. Nothing is compared with
    real images. Window: a Gaussian of standard deviation `sigma` pixels, data range 2 (images in [-1, 1]).
    """

    needs_references = False

    def __init__(self, per_class: bool = False, sigma: float = 1.0):
        if not sigma > 0:
            raise ConfigurationError(f"evaluation.metrics.ssim.sigma must be positive, got {sigma}.")
        self.per_class, self.sigma = per_class, sigma

    def __call__(self, samples: Samples) -> dict[str, float]:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        def similarity(group: Group) -> float:
            if group.before is None:
                return 1.0
            pair = (to_unit_range(judged.images) for judged in (group.samples, group.before))
            return float(ssim(*pair, sigma=self.sigma, data_range=2.0))

        return {_key("ssim", name): similarity(group) for name, group in samples.groups(self.per_class).items()}

    def provenance(self) -> dict[str, Any]:
        return {
            "library": "torchmetrics",
            "sigma": self.sigma,
            "reference": "base samples from the same noise",
        }


def share(mask: Tensor) -> float:
    """Mean of a boolean mask."""
    return float(mask.double().mean())


def _key(metric: str, group: str) -> str:
    return f"per_class/{metric}{group}" if group.startswith("/") else f"{metric}_{group}"


def _comparable(groups: dict[str, Group], min_samples: int) -> dict[str, Group]:
    return {
        name: group
        for name, group in groups.items()
        if group.reference is not None and min(len(group.samples), len(group.reference)) >= min_samples
    }


def _at_least_two(metric: str, min_samples: int) -> int:
    if min_samples < 2:
        raise ConfigurationError(f"evaluation.metrics.{metric}.min_samples must be at least 2, got {min_samples}.")
    return min_samples


@final
class _Features(nn.Module):
    """Stands where torchmetrics expects a feature extractor: the features are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features

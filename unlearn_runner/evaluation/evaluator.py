"""Draws samples once, has them judged once, and hands them to every metric."""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import Judge, Judged
from unlearn_runner.evaluation.metrics import Group, Metric, Samples
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.types import make_generator


@dataclass(frozen=True)
class Sampling:
    """How an evaluation draws.

    `num_samples` under the forget conditions and as many under all other conditions together, evenly over the
    conditions; an unconditional model draws `num_samples` in all. Always from the same `seed`.
    """

    num_samples: int = 200
    sampler: str = "ddim"
    num_inference_steps: int = 25
    batch_size: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in ("ddim", "ddpm"):
            raise ConfigurationError(f"evaluation.sampler must be ddim or ddpm, got '{self.sampler}'.")
        for name in ("num_samples", "num_inference_steps", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"evaluation.{name} must be positive, got {getattr(self, name)}.")


class Evaluation(NamedTuple):
    """What one evaluation found."""

    scores: dict[str, float]  # without the prefix `eval/`
    grid: UInt8[Tensor, "n c h w"]  # a row of samples for each condition, `grid_columns` wide
    grid_columns: int
    judged: dict[str, Judged]  # the samples by set, to compare a later model's with


@final
class Evaluator:
    """Scores a model on one dataset. The same object scores the base, the unlearned model and the oracle."""

    def __init__(self, data: ForgetRetain, judge: Judge, metrics: dict[str, Metric], sampling: Sampling):
        self.spec = data.spec
        self.judge = judge
        self.metrics = metrics
        self.sampling = sampling
        self.forget_labels = data.forget_labels
        labels = range(len(data.spec.label_names or ()))
        self.retain_labels = [label for label in labels if label not in self.forget_labels]
        self.references = self._references(data) if any(metric.needs_references for metric in metrics.values()) else {}

    def __call__(self, model: DiffusionModel, before: dict[str, Judged] | None = None) -> Evaluation:
        """Score `model`; `before` are the base model's samples, for the metrics that compare with them."""
        conditions = self._conditions()
        judged = {}
        for name, labels in conditions.items():
            generator = make_generator(self.sampling.seed, f"evaluation/{name}", self.judge.device)
            images = model.sample(
                self.sampling.num_samples,
                None if labels is None else labels.to(self.judge.device),
                generator,
                self.sampling.num_inference_steps,
                self.sampling.sampler,
                self.sampling.batch_size,
            )
            judged[name] = self.judge(to_uint8(images))

        samples = self._grouped(judged, conditions, before)
        scores: dict[str, float] = {}
        for metric in self.metrics.values():
            scores |= metric(samples)
        return Evaluation(scores, *self._grid(judged, conditions), judged)

    def provenance(self) -> dict[str, Any]:
        """All that the scores depend on besides the model, the same for every metric; then metric by metric."""
        sampling = self.sampling
        return {
            "features": {
                "extractor": self.judge.weights,
                "layer": f"features ({self.judge.classifier.head.in_features})",
                "test_accuracy": self.judge.test_accuracy,
            },
            "num_samples": {name: sampling.num_samples for name in self._conditions()},
            "sampler": sampling.sampler,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": 1.0,
            "seed": sampling.seed,
            "num_references": {name: len(reference) for name, reference in self.references.items()},
            "metrics": {name: metric.provenance() for name, metric in self.metrics.items()},
        }

    def _conditions(self) -> dict[str, Int64[Tensor, "n"] | None]:
        """The labels to draw under, set by set; one unlabelled pool for an unconditional model."""
        if self.spec.label_names is None:
            return {"all": None}
        sets = {"forget": self.forget_labels, "retain": self.retain_labels}
        return {name: _evenly(labels, self.sampling.num_samples) for name, labels in sets.items() if labels}

    def _references(self, data: ForgetRetain) -> dict[str, Judged]:
        """Real training images, judged: the forget images, those of the retained conditions, each clean class."""
        retain = self._judge_all(data.retain)
        references = {"forget": self._judge_all(data.forget)}
        if self.spec.label_names is None:
            return references | {"retain": retain}
        under_retained = torch.isin(data.retain.labels, torch.tensor(self.retain_labels))
        references["retain"] = retain.select(under_retained)
        for label, name in enumerate(self.spec.label_names):
            clean = retain.select(data.retain.labels == label)
            # A class that is forgotten as a whole has no clean images; it is compared with what it was.
            references[f"/{name}"] = clean if len(clean) else references["forget"]
        return references

    def _judge_all(self, images: LabelledImages) -> Judged:
        return self.judge(images.pixels)

    def _grouped(
        self,
        judged: dict[str, Judged],
        conditions: dict[str, Tensor | None],
        before: dict[str, Judged] | None,
    ) -> Samples:
        def group(name: str, rows: Tensor, reference: str) -> Group:
            earlier = None if before is None else before[name].select(rows)
            return Group(judged[name].select(rows), self.references.get(reference), earlier)

        everything = torch.arange(self.sampling.num_samples)
        names = ("all", "all") if "all" in judged else ("forget", "retain" if "retain" in judged else "forget")
        per_class, label_of = {}, {}
        for name, labels in conditions.items():
            for label in [] if labels is None else labels.unique().tolist():
                title = self.spec.label_names[label]
                per_class[title] = group(name, torch.nonzero(labels == label).squeeze(1), f"/{title}")
                label_of[title] = label
        return Samples(
            spec=self.spec,
            forget=group(names[0], everything, "forget"),
            retain=group(names[1], everything, "retain"),
            per_class=dict(sorted(per_class.items(), key=lambda item: label_of[item[0]])),
            retain_labels=conditions.get("retain"),
            label_of=label_of,
        )

    def _grid(
        self, judged: dict[str, Judged], conditions: dict[str, Tensor | None], rows: int = 10
    ) -> tuple[UInt8[Tensor, "n c h w"], int]:
        """One line for each condition in the order of the labels; 10 lines of 10 for an unconditional model."""
        if "all" in judged:
            return judged["all"].images[: rows * rows], rows
        lines = {}
        for name, labels in conditions.items():
            for label in labels.unique().tolist():
                lines[label] = judged[name].images[labels == label]
        width = min(20, *map(len, lines.values()))
        return torch.cat([lines[label][:width] for label in sorted(lines)]), width


def _evenly(labels: list[int], count: int) -> Int64[Tensor, "{count}"]:
    """`count` labels, each as often as the others up to one, in ascending order."""
    return torch.tensor(labels)[torch.arange(count) * len(labels) // count]


def gap(scores: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """|score - oracle's score| for every score that both have."""
    return {key: abs(value - oracle[key]) for key, value in scores.items() if key in oracle}

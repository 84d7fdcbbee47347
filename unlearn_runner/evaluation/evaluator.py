"""Draws samples once, has them judged once, and hands them to every metric."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn_runner.cache import cached, digest, fingerprint, write_json
from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.distributed import from_first
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import Judge, Judged
from unlearn_runner.evaluation.metrics import SSIM, Group, ImageMetric, Metric, PromptMetric, Samples
from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, Bootstrap, NumInferenceSteps, NumSamples, Sampler, Seed
from unlearn_runner.types import make_generator

LIBRARIES = ("diffusers", "torchmetrics", "torch-fidelity", "transformers")  # whose code scores depend on
NOT_HELD_OUT = {
    "forget_test": "no forget image is held out: the dataset has none, or too few for its dataset.test_fraction",
    "retain_test": "no retained image is held out: the dataset has none, or too few for its dataset.test_fraction",
}


@dataclass(frozen=True)
class Sampling:
    """How an evaluation draws.

    `num_samples` under the forget conditions and as many under all other conditions together, evenly over the
    conditions; an unconditional model draws `num_samples` in all. Always from the same `seed`. `bootstrap` is the
    number of resamplings for 95 % intervals; None: no intervals. `forget_only` leaves out the other conditions, where
    there are conditions.
    """

    num_samples: NumSamples = 200
    sampler: Sampler = "ddim"
    num_inference_steps: NumInferenceSteps = 25
    batch_size: BatchSize = 200
    seed: Seed = 0
    bootstrap: Bootstrap | None = None
    forget_only: bool = False


class Evaluation(NamedTuple):
    """What one evaluation found."""

    scores: dict[str, float]  # without the prefix `eval/`; finite
    not_finite: list[str]  # keys of scores that came to be no finite numbers, and are left out
    intervals: dict[str, list[float]]  # of those scores, low and high ends; empty without a bootstrap
    seconds: dict[str, float]  # what it cost: "sampling", "judging", each metric, "bootstrap"
    evaluations_per_sample: float  # of the network, in drawing
    grid: UInt8[Tensor, "n c h w"]  # a row of samples for each condition, `grid_columns` wide
    grid_columns: int
    judged: dict[str, Judged]  # the samples by set, to compare a later model's with

    def save(self, folder: Path) -> None:
        """Write the folder that `open_evaluation` reads."""
        tensors = {
            f"{name}/{field}": part.clone(
                memory_format=torch.contiguous_format
            )  # safetensors takes no other, nor shared memory
            for name, judged in self.judged.items()
            for field, part in judged.tensors().items()
        }
        save_file({"grid": self.grid.contiguous(), **tensors}, folder / "samples.safetensors")
        numbers = {name: value for name, value in self._asdict().items() if name not in ("grid", "judged")}
        write_json(folder / "evaluation.json", numbers)


def open_evaluation(folder: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote."""
    tensors = load_file(folder / "samples.safetensors")
    grid = tensors.pop("grid")
    judged: dict[str, dict[str, Tensor]] = {}
    for key, part in tensors.items():
        name, field = key.split("/")
        judged.setdefault(name, {})[field] = part
    numbers = json.loads((folder / "evaluation.json").read_text())
    return Evaluation(grid=grid, judged={name: Judged(**fields) for name, fields in judged.items()}, **numbers)


def require_enough_samples(
    metrics: dict[str, Metric | ImageMetric | PromptMetric],
    sampling: Sampling,
    num_features: int,
    num_labels: int | None,
) -> None:
    """Raise ConfigurationError if a group will have fewer samples than a metric of distances can do with."""
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            continue
        least = metric.least(num_features)
        groups = {"": sampling.num_samples}
        if metric.per_class and num_labels is not None and num_labels > 1:
            groups[" for each class"] = sampling.num_samples // (num_labels - 1)
        for which, count in groups.items():
            if count < least:
                mend = f"evaluation.metrics.{name}.per_class=false" if which else f"evaluation.metrics.{name}=null"
                raise ConfigurationError(
                    f"evaluation.metrics.{name} needs at least {least} samples{which} (its min_samples, and more than "
                    f"{num_features} features); evaluation.num_samples={sampling.num_samples} gives {count}: "
                    f"draw more, or leave it out with {mend}."
                )


@final
class Evaluator:
    """Scores a model on one dataset. The same object scores the base, the unlearned model and the oracle.

    What many runs have in common is made once and kept in `cache_dir`: the judge's view of the training images, and,
    by `once`, the evaluations of bases and oracles.
    """

    def __init__(
        self,
        data: ForgetRetain,
        judge: Judge,
        metrics: dict[str, Metric | ImageMetric | PromptMetric],
        sampling: Sampling,
        cache_dir: Path,
        clip: Clip | None = None,
    ):
        self.cache_dir = cache_dir
        self.data = data
        self.spec = data.spec
        self.judge = judge
        self.on_samples = {name: metric for name, metric in metrics.items() if isinstance(metric, Metric)}
        self.on_images = {name: metric for name, metric in metrics.items() if isinstance(metric, ImageMetric)}
        self.on_prompts = {name: metric for name, metric in metrics.items() if isinstance(metric, PromptMetric)}
        self.on_rows = self.on_images | self.on_prompts
        self.clip = clip
        self.sampling = sampling
        self.retain_labels = [
            label for label in range(len(data.spec.label_names or ())) if label not in data.forget_labels
        ]
        self.conditions = self._conditions()
        needed = any(metric.needs_references for metric in self.on_samples.values())
        self.references = self._references() if needed else {}

    def __call__(self, model: GenerativeModel, before: dict[str, Judged] | None = None) -> Evaluation:
        """Score `model`; `before` are the base model's samples, for the metrics that compare with them.

        Raises NonFiniteError if it draws pictures that are not finite.
        """
        clock = _Clock()
        judged, evaluations = {}, 0
        for name in self.conditions:
            evaluations -= model.network_evaluations
            with clock("sampling"):
                images = self._draw(model, name)
            evaluations += model.network_evaluations
            with clock("judging"):
                judged[name] = self.judge(to_uint8(images, f"pictures drawn under the {name} conditions"))
        for name, metric in self.on_samples.items():
            if isinstance(metric, SSIM):
                with clock(name):
                    judged = {
                        part: metric.compare(drawn, None if before is None else before[part])
                        for part, drawn in judged.items()
                    }
        rows = {}
        for name, metric in self.on_images.items():
            if not metric.applies_to(model):
                continue
            with clock(name):
                rows[name] = metric.measure(model, self.data)
        for name, metric in self.on_prompts.items() if model.prompts is not None else ():
            if not metric.applies_to(model):
                continue
            with clock(name):
                rows[name] = metric.measure(model, self.data, self.judge, self.clip)
        found = from_first(lambda: self._score(judged, rows, clock, before))
        scores = {key: value for key, value in found.items() if math.isfinite(value)}
        with clock("bootstrap"):
            redrawn = self.sampling.bootstrap is not None
            intervals = from_first(lambda: self._intervals(scores, judged, rows, before)) if redrawn else {}
        evaluations /= self.sampling.num_samples * len(self.conditions)
        not_finite = sorted(found.keys() - scores.keys())
        return Evaluation(scores, not_finite, intervals, clock.seconds, evaluations, *self._grid(judged), judged)

    def once(self, model: GenerativeModel, before: dict[str, Judged] | None = None) -> Evaluation:
        """What calling it gives, kept in the cache: for models that many runs share, bases and oracles."""
        metrics = [*self.on_samples.values(), *self.on_rows.values()]
        key = {
            "model": model.fingerprint(),
            "before": None if before is None else digest({name: judged.images for name, judged in before.items()}),
            "data": self.data.fingerprint,
            "judge": self.judge.fingerprint,
            "clip": None if self.clip is None else self.clip.fingerprint(),
            "settings": self.provenance(model),
            "metrics": [f"{type(metric).__module__}.{type(metric).__qualname__}" for metric in metrics],
            "code": _code(),
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
            "device": str(self.judge.device.type),
        }

        def make(folder: Path) -> None:
            self(model, before).save(folder)

        return open_evaluation(cached(self.cache_dir, "evaluations", key, make, open_evaluation, together=True))

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        """What scores depend on besides the weights: what all metrics have in common, then metric by metric."""
        sampling = self.sampling
        return {
            "features": self.judge.provenance(),
            "num_samples": {name: sampling.num_samples for name in self.conditions},
            "sampler": sampling.sampler,
            "num_inference_steps": sampling.num_inference_steps,
            "batch_size": sampling.batch_size,
            "guidance_scale": float(model.guidance_scale),
            **({} if self.clip is None else {**self.clip.provenance, "clip_digest": digest(self.clip.state_dict())}),
            "seed": sampling.seed,
            "bootstrap": self.sampling.bootstrap,
            "num_references": {name: len(reference) for name, reference in self.references.items()},
            "left_out": self.left_out(),
            "metrics": {
                **{name: metric.provenance() for name, metric in self.on_samples.items()},
                **{name: metric.provenance(model) for name, metric in self.on_rows.items()},
            },
        }

    def left_out(self) -> list[str]:
        """A sentence for each metric without the images that it needs, for each group with too few of them."""
        sentences = [
            f"{score} is left out: {NOT_HELD_OUT[part]}."
            for metric in self.on_images.values()
            for score, part in metric.needs.items()
            if not len(getattr(self.data, part))
        ]
        for name, metric in self.on_samples.items():
            if not metric.needs_references:
                continue
            least = metric.least(self.judge.num_features)
            groups = [group for group in self.references if metric.per_class or not group.startswith("/")]
            for group in groups:
                if (count := len(self.references[group])) < least:
                    sentences.append(
                        f"{name} of {group.strip('/')} is left out: {count} real images, it needs {least}."
                    )
        return sentences

    def _draw(self, model: GenerativeModel, name: str) -> Float[Tensor, "n c h w"]:
        labels, device = self.conditions[name], self.judge.device
        return model.sample(
            self.sampling.num_samples,
            None if labels is None else labels.to(device),
            make_generator(self.sampling.seed, f"evaluation/{name}", device),
            self.sampling.num_inference_steps,
            self.sampling.sampler,
            self.sampling.batch_size,
        )

    def _score(
        self,
        judged: dict[str, Judged],
        rows: dict[str, dict[str, Tensor]],
        clock: "_Clock",
        before: dict[str, Judged] | None,
    ) -> dict[str, float]:
        samples = self._grouped(judged, before)
        scores: dict[str, float] = {}
        for name, metric in self.on_samples.items():
            with clock(name):
                scores |= metric(samples)
        for name, tables in rows.items():
            with clock(name):
                scores |= self.on_rows[name](tables)
        return scores

    def _intervals(
        self,
        scores: dict[str, float],
        judged: dict[str, Judged],
        rows: dict[str, dict[str, Tensor]],
        before: dict[str, Judged] | None,
    ) -> dict[str, list[float]]:
        """95 % bootstrap intervals: samples redrawn within their condition, real images within their set.

        The quantiles are moved by the bootstrap's own bias (FID and KID of a resample are too high, for it holds
        samples twice), so that an interval lies around the score.
        """
        generator = make_generator(self.sampling.seed, "bootstrap")

        def again(n: int) -> Int64[Tensor, "{n}"]:
            return torch.randint(n, (n,), generator=generator)

        drawn: dict[str, list[float]] = {}
        for _ in range(self.sampling.bootstrap):
            chosen = {}
            for name, labels in self.conditions.items():
                same = [torch.arange(self.sampling.num_samples)] if labels is None else _positions(labels)
                chosen[name] = judged[name].select(torch.cat([part[again(len(part))] for part in same]))
            redrawn = {
                name: {part: table[again(len(table))] for part, table in tables.items()}
                for name, tables in rows.items()
            }
            for key, value in self._score(chosen, redrawn, _Clock(), before).items():
                drawn.setdefault(key, []).append(value)
        intervals = {}
        for key, score in scores.items():
            values = np.array(drawn[key])
            if np.isfinite(values).all():
                low, high = np.quantile(values, [0.025, 0.975]) + (score - values.mean())
                intervals[key] = [float(low), float(high)]
        return intervals

    def _conditions(self) -> dict[str, Int64[Tensor, "n"] | None]:
        """The labels to draw under, set by set, ascending; one unlabelled pool for an unconditional model."""
        if self.spec.label_names is None:
            return {"all": None}
        sets = {"forget": self.data.forget_labels, "retain": self.retain_labels}
        if self.sampling.forget_only:
            del sets["retain"]
        return {name: _evenly(labels, self.sampling.num_samples) for name, labels in sets.items() if labels}

    def _references(self) -> dict[str, Judged]:
        """Real training images, judged: the forget images, those of the retained conditions, each clean class."""
        retain, forget = self._judged_once("retain", self.data.retain), self._judged_once("forget", self.data.forget)
        references = {"forget": forget}
        if self.spec.label_names is None:
            return references | {"retain": retain}
        labels = self.data.retain.labels
        references["retain"] = retain.select(torch.isin(labels, torch.tensor(self.retain_labels)))
        for label, name in enumerate(self.spec.label_names):
            clean = retain.select(labels == label)
            # A class that is forgotten as a whole has no clean images; it is compared with what it was.
            references[f"/{name}"] = clean if len(clean) else references["forget"]
        return references

    def _judged_once(self, name: str, images: LabelledImages) -> Judged:
        """As the model saw them in training: every second one mirrored, if it saw them mirrored. No picture is kept."""
        key = {
            "judge": self.judge.fingerprint,
            "data": self.data.fingerprint,
            "images": name,
            "code": _code(),
            "device": str(self.judge.device.type),
        }

        def make(folder: Path) -> None:
            pixels = images.pixels
            if self.spec.horizontal_flip:
                pixels = pixels.clone()
                pixels[1::2] = pixels[1::2].flip(-1)
            tensors = replace(self.judge(pixels), images=pixels[:, :0]).tensors()
            save_file({field: part.clone() for field, part in tensors.items()}, folder / "judged.safetensors")

        def read(folder: Path) -> Judged:
            return Judged(**load_file(folder / "judged.safetensors"))

        return read(cached(self.cache_dir, "references", key, make, read, together=True))

    def _grouped(self, judged: dict[str, Judged], before: dict[str, Judged] | None) -> Samples:
        def group(name: str, rows: Tensor, reference: str) -> Group:
            earlier = None if before is None else before[name].select(rows)
            return Group(judged[name].select(rows), self.references.get(reference), earlier)

        everything = torch.arange(self.sampling.num_samples)
        names = ("all", "all") if "all" in judged else ("forget", "retain" if "retain" in judged else "forget")
        per_class, label_of = {}, {}
        for name, labels in self.conditions.items():
            for rows in [] if labels is None else _positions(labels):
                label = int(labels[rows[0]])
                title = self.spec.label_names[label]
                per_class[title] = group(name, rows, f"/{title}")
                label_of[title] = label
        return Samples(
            spec=self.spec,
            forget=group(names[0], everything, "forget"),
            retain=group(names[1], everything, "retain"),
            per_class=dict(sorted(per_class.items(), key=lambda item: label_of[item[0]])),
            retain_labels=self.conditions.get("retain"),
            label_of=label_of,
        )

    def _grid(self, judged: dict[str, Judged], rows: int = 10) -> tuple[UInt8[Tensor, "n c h w"], int]:
        """One line for each condition in the order of the labels; 10 lines of 10 for an unconditional model."""
        if "all" in judged:
            return judged["all"].images[: rows * rows], rows
        lines = {
            int(labels[positions[0]]): judged[name].images[positions]
            for name, labels in self.conditions.items()
            for positions in _positions(labels)
        }
        width = min(20, *map(len, lines.values()))
        return torch.cat([lines[label][:width] for label in sorted(lines)]), width


class _Clock:
    """`with clock(name):` adds the seconds inside to `seconds[name]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _evenly(labels: list[int], count: int) -> Int64[Tensor, "{count}"]:
    """`count` labels, each as often as the others up to one, in ascending order."""
    return torch.tensor(labels)[torch.arange(count) * len(labels) // count]


def _positions(labels: Int64[Tensor, "n"]) -> list[Int64[Tensor, "m"]]:
    """Where each label stands, in ascending order of the labels."""
    return [torch.nonzero(labels == label).squeeze(1) for label in labels.unique()]


def _code() -> str:
    """A hash of the code that scores depend on: whoever changes it does not meet old scores in the cache."""
    package = Path(__file__).parents[1]
    files = sorted(file for part in ("evaluation", "models", "data") for file in (package / part).glob("*.py"))
    return fingerprint([file.read_text() for file in files])


def gap(scores: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """|score - oracle's score| for every score that both have."""
    return {key: abs(value - oracle[key]) for key, value in scores.items() if key in oracle}

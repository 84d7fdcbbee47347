"""Draws samples once, has them judged once, and hands them to every metric."""

import json
import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn_runner.cache import cached, cached_scores, digest, write_json
from unlearn_runner.comparison.columns import bounds_of, counted_of
from unlearn_runner.comparison.statistics import Z, wilson
from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages, contents_of_labels
from unlearn_runner.distributed import from_first
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.judge import Judge, Judged
from unlearn_runner.evaluation.metrics import Metric, Rows
from unlearn_runner.evaluation.view import (
    MISSING,
    Clock,
    Conditions,
    Group,
    RealSamples,
    Samples,
    View,
    evenly,
    positions,
)
from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, Bootstrap, NumInferenceSteps, NumSamples, References, Sampler, Seed
from unlearn_runner.rules import evaluation_options
from unlearn_runner.types import make_generator

VERSION = (
    2  # of drawing and judging: goes up when the code of models, data or evaluation makes other samples or features
)
INTERVALS_VERSION = 2  # goes up when the code makes other intervals of the same scores
GRID_ROWS = 10  # of the pictures of an unconditional model
LIBRARIES = ("diffusers", "torchmetrics", "torch-fidelity", "transformers")  # whose code scores depend on
ENOUGH_HELD_OUT = 1000  # images, for `references=auto`: fewer would blur a distance more than memorising does
LEAST_HELD_OUT = 10  # retained images, of which shares of fewer would say nothing
NOT_HELD_OUT = {
    "forget_test": "no forget image is held out: the dataset has none, or too few for its dataset.test_fraction",
    "retain_test": "no retained image is held out: the dataset has none, or too few for its dataset.test_fraction",
}


@dataclass(frozen=True)
class Sampling:
    """How an evaluation draws.

    `num_samples` under the forget conditions and as many under all other conditions together, evenly over the
    conditions; an unconditional model draws `num_samples` in all. Always from the same `seed`. `bootstrap` is how
    often samples are redrawn for 95 % intervals; None: no intervals. `forget_only` leaves out the other conditions,
    where there are conditions. `references`: whether samples are compared with real images that methods train on, or
    with held-out ones; auto: with held-out ones of what is to be kept, and of what is to be forgotten, where there are
    at least 1000.
    """

    num_samples: NumSamples = 200
    sampler: Sampler = "ddim"
    num_inference_steps: NumInferenceSteps = 25
    batch_size: BatchSize = 200
    seed: Seed = 0
    bootstrap: Bootstrap | None = None
    forget_only: bool = False
    references: References = "training"


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
    metrics: dict[str, Metric | None],
    sampling: Sampling,
    num_features: int,
    num_labels: int | None,
    path: str = "evaluation",
) -> None:
    """Raise ConfigurationError if a group will have fewer samples than a metric of distances can do with; `path` is
    where the metrics are in the configuration.
    """
    for name, metric in metrics.items():
        if metric is not None:
            classes, least = num_labels if metric.per_class else None, metric.least(num_features)
            why = "one of each" if least == 1 else f"its min_samples, and more than {num_features} features"
            evaluation_options.enough_samples(f"{path}.metrics.{name}", least, why, sampling.num_samples, classes)


def require_references(metrics: dict[str, Metric | None], sampling: Sampling, data: ForgetRetain) -> None:
    """Raise ConfigurationError if samples are to be compared with held-out images, and none is held out."""
    compares = any("references" in metric.needs for metric in metrics.values() if metric is not None)
    if compares and sampling.references == "held_out" and not (len(data.forget_test) or len(data.retain_test)):
        raise ConfigurationError(
            f"evaluation.references=held_out: no image of {data.spec.name} is held out, so there is nothing to "
            "compare samples with; take evaluation.references=training, or a larger dataset.test_fraction."
        )


@final
class Evaluator:
    """Scores a model on one dataset. The same object scores the base, the unlearned model and the oracle.

    What many runs have in common is made once and kept in `cache_dir`: the judge's view of real images, what those
    score themselves, and, by `once`, the evaluations of bases and oracles.
    """

    def __init__(
        self,
        data: ForgetRetain,
        judge: Judge,
        metrics: dict[str, Metric | None],
        sampling: Sampling,
        cache_dir: Path,
        clip: Clip | None = None,
    ):
        self.cache_dir = cache_dir
        self.data = data
        self.spec = data.spec
        self.judge = judge
        self.metrics = {name: metric for name, metric in metrics.items() if metric is not None}
        self.clip = clip
        self.sampling = sampling
        self.retain_labels = [
            label
            for label in range(len(data.spec.label_names or ()))
            if label not in data.forget_labels and label not in data.spec.absent_labels
        ]
        self.conditions = self._conditions()
        require_references(metrics, sampling, data)

    def __call__(self, model: GenerativeModel, before: dict[str, Judged] | None = None) -> Evaluation:
        """Score `model`; `before` are the base model's samples, for the metrics that compare with them.

        Raises NonFiniteError if it draws pictures that are not finite.
        """
        clock = Clock()
        view = self.view(model, before, clock)
        samples, rows = view.samples, self.measure(view, clock)
        found = from_first(lambda: self._score(samples, rows, clock))
        scores = {key: value for key, value in found.items() if math.isfinite(value)}
        with clock("bootstrap"):
            redrawn = self.sampling.bootstrap is not None
            intervals = from_first(lambda: self._intervals(view, rows, scores)) if redrawn else {}
        evaluations = view.network_evaluations / (self.sampling.num_samples * len(self.conditions))
        not_finite = sorted(found.keys() - scores.keys())
        judged = {name: replace(part, appearance=None) for name, part in view.judged.items()}
        return Evaluation(scores, not_finite, intervals, clock.seconds, evaluations, *self._grid(judged), judged)

    def view(self, model: GenerativeModel, before: dict[str, Judged] | None = None, clock: Clock | None = None) -> View:
        """What the metrics see of a model."""
        return View(
            model,
            self.data,
            self.judge,
            self.clip,
            partial(self._draw, model),
            self.conditions,
            before,
            lambda: self.references,
            clock,
            self.cache_dir,
        )

    def measure(self, view: View, clock: Clock) -> dict[str, Rows]:
        """The rows of each metric whose needs are met."""
        rows = {}
        for name, metric in self.metrics.items():
            if not view.lacks(metric.needs):
                with clock(name):
                    rows[name] = metric.measure(view)
        return rows

    def once(self, model: GenerativeModel, before: dict[str, Judged] | None = None) -> Evaluation:
        """What calling it gives, kept in the cache: for models that many runs share, bases and oracles."""

        def make(folder: Path) -> None:
            self(model, before).save(folder)

        key = self.key(model, before)
        return open_evaluation(cached(self.cache_dir, "evaluations", key, make, open_evaluation, together=True))

    def key(self, model: GenerativeModel, before: dict[str, Judged] | None = None) -> dict[str, Any]:
        """Everything that the scores of this model depend on."""
        return {
            **self._key(),
            "model": model.fingerprint(),
            "before": None if before is None else digest({name: judged.images for name, judged in before.items()}),
            "clip": None if self.clip is None else self.clip.fingerprint(),
            "settings": self.provenance(model),  # with the version of each metric
            "metrics": _classes(self.metrics),
            **({} if self.sampling.bootstrap is None else {"intervals": INTERVALS_VERSION}),
        }

    def _key(self) -> dict[str, Any]:
        """What everything that is kept in the cache depends on, whatever the model."""
        return {
            "version": VERSION,
            "data": self.data.fingerprint,
            "judge": self.judge.fingerprint,
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
            "device": str(self.judge.device.type),
        }

    def floor(self, model: GenerativeModel) -> dict[str, float]:
        """What as many real images score as samples are drawn, under the same labels: no model should be better.

        By the metrics that compare with real images; kept in the cache. Distances are those of held-out images where
        samples are compared with training images, and of training images where they are compared with held-out ones, so
        that none is compared with itself. Where there are too few, it is for the metric to say what that means.
        """
        needing = ("references", *([] if self.judge.novelty is None else ["novelty"]))
        metrics = {name: metric for name, metric in self.metrics.items() if set(needing) & set(metric.needs)}
        if not metrics:
            return {}
        settings = self.provenance(model)
        key = {
            **self._key(),
            "conditions": {
                name: labels if labels is None else labels.tolist() for name, labels in self.conditions.items()
            },
            "settings": {name: settings[name] for name in ("num_samples", "seed", "references")},
            "metrics": {name: settings["metrics"][name] for name in metrics},
            "classes": _classes(metrics),
        }

        def measure() -> dict[str, float]:
            real = RealSamples(self._real_samples(), self._held_out_retained(), self.sampling.num_samples, self.judge)
            found = from_first(lambda: [metric.floor(real) for metric in metrics.values()])
            return {key: value for scores in found for key, value in scores.items() if math.isfinite(value)}

        return cached_scores(self.cache_dir, "floors", key, measure)

    def _real_samples(self) -> Samples | None:
        """Real images that are not among the references, in the proportion of the labels that are drawn under."""
        if not self.references:
            return None
        groups = {}
        for name, held_out in self.held_out.items():
            judged, labels = self._real(name, not held_out)
            order = self._order(len(labels))
            wanted = self.conditions.get(name)
            all_alike = order[: self.sampling.num_samples]
            rows = all_alike if wanted is None else order[_in_proportion(labels[order], wanted)]
            groups[name] = Group(judged.select(rows), self.references.get(name))
        return Samples(self.spec, **groups, per_class={}, retain_labels=None, label_of={}, places={})

    def _held_out_retained(self) -> Judged | None:
        images = self.data.retain_test
        if self.judge.novelty is None or len(images) < LEAST_HELD_OUT:
            return None
        rows = self._order(len(images))[: self.sampling.num_samples]
        return self.judge(self.data.as_trained(images.pixels[rows]))

    def _order(self, count: int) -> Int64[Tensor, "{count}"]:
        return torch.from_numpy(np.random.default_rng(self.sampling.seed).permutation(count))

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
            "references": {name: "held out" if held_out else "training" for name, held_out in self.held_out.items()},
            "num_references": {name: len(reference) for name, reference in self.references.items()},
            "left_out": self.left_out(),
            "metrics": {
                name: {**metric.provenance(model), "version": metric.version} for name, metric in self.metrics.items()
            },
        }

    def left_out(self) -> list[str]:
        """A sentence for each metric without the images that it needs, for each group with too few of them."""
        sentences = [
            f"{score} is left out: {NOT_HELD_OUT[part]}."
            for metric in self.metrics.values()
            for score, part in metric.held_out.items()
            if not len(getattr(self.data, part))
        ]
        for name, metric in self.metrics.items():
            if "references" not in metric.needs:
                continue
            least = metric.least(self.judge.num_features)
            groups = [group for group in self.references if metric.per_class or not group.startswith("/")]
            for group in groups:
                if (count := len(self.references[group])) < least:
                    kind = "held-out" if self.held_out["forget" if group == "forget" else "retain"] else "real"
                    sentences.append(
                        f"{name} of {group.strip('/')} is left out: {count} {kind} images, it needs {least}."
                    )
        return sentences

    def left_out_of(self, model: GenerativeModel) -> list[str]:
        """A sentence for each need that is not met for a model, with the metrics that are left out for it."""
        view, names = self.view(model), {}
        for name, metric in self.metrics.items():
            for need in view.lacks(metric.needs)[:1]:
                names.setdefault(need, []).append(name)
        return [f"{', '.join(metrics)} left out: {MISSING[need]}." for need, metrics in names.items()]

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

    def _score(self, samples: Samples, rows: dict[str, Rows], clock: Clock) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, tables in rows.items():
            with clock(name):
                scores |= self.metrics[name].score(samples, tables)
        return scores

    def _intervals(self, view: View, rows: dict[str, Rows], scores: dict[str, float]) -> dict[str, list[float]]:
        """95 % intervals: how far other samples under the same conditions, and other real images of each set, would
        move a score.

        Shares of samples have Wilson's interval. All else is scored on half the samples of each condition, each of them
        twice, and on the other half, `bootstrap` / 2 times (balanced half-samples: McCarthy, Rev. Int. Stat. Inst.
        37:239, 1969). Half the difference of two such scores varies as the score does where that is a mean. A distance
        is curved, too; what comes of that is twice in the difference's variance, and once in that of the halves' mean,
        which is therefore subtracted (the jackknife has the same bias: Efron and Stein, Ann. Stat. 9:586, 1981). A
        bootstrap has it three times: its intervals of a FID near 0 are 1.7 times too wide.
        """
        generator = make_generator(self.sampling.seed, "bootstrap")

        def halves(n: int) -> list[Int64[Tensor, "{n}"]]:
            order = torch.randperm(n, generator=generator)
            one, other, rest = order.tensor_split([n // 2, n - n % 2])
            return [torch.cat([half, half, rest]) for half in (one, other)]

        scored: dict[str, list[float]] = {}  # by key, of each pair of halves one after the other
        for _ in range(self.sampling.bootstrap // 2):
            of_conditions = {}
            for name, labels in self.conditions.items():
                same = [torch.arange(self.sampling.num_samples)] if labels is None else positions(labels)
                parts = [[part[half] for half in halves(len(part))] for part in same]
                of_conditions[name] = [torch.cat(of_half) for of_half in zip(*parts, strict=True)]
            of_rows = {
                name: {
                    part: of_conditions[part] if self.metrics[name].paired else halves(len(table))
                    for part, table in tables.items()
                }
                for name, tables in rows.items()
            }
            for half in range(2):
                samples = view.chosen({name: chosen[half] for name, chosen in of_conditions.items()})
                tables = {
                    name: {part: table[of_rows[name][part][half]] for part, table in of_metric.items()}
                    for name, of_metric in rows.items()
                }
                for key, value in self._score(samples, tables, Clock()).items():
                    scored.setdefault(key, []).append(value)
        without = [key for name in rows for key in self.metrics[name].without_interval]
        intervals = {}
        for key, score in scores.items():
            if any(fnmatchcase(key, pattern) for pattern in without):
                continue
            if (count := _counted(key, view.samples)) is not None:
                intervals[key] = list(wilson(score, count))
                continue
            pairs = np.array(scored[key]).reshape(-1, 2)
            if np.isfinite(pairs).all():
                difference = np.mean((pairs[:, 0] - pairs[:, 1]) ** 2) / 4
                curvature = pairs.mean(1).var(ddof=1)
                half_width = Z * math.sqrt(max(difference - curvature, difference / 2))  # it is no more than half
                least, most = bounds_of(key)
                intervals[key] = [max(least, score - half_width), min(most, score + half_width)]
        return intervals

    def _conditions(self) -> Conditions:
        """The labels to draw under, set by set, ascending; one unlabelled pool for an unconditional model."""
        if self.spec.label_names is None:
            return {"all": None}
        sets = {"forget": self.data.forget_labels, "retain": self.retain_labels}
        if self.sampling.forget_only:
            del sets["retain"]
        return {name: evenly(labels, self.sampling.num_samples) for name, labels in sets.items() if labels}

    @cached_property
    def held_out(self) -> dict[str, bool]:
        """Whether the real images that samples are compared with are held out, of what is to be forgotten and kept."""
        there = {"forget": self.data.forget_test, "retain": self.data.retain_test}
        auto = {name: len(images) >= ENOUGH_HELD_OUT for name, images in there.items()}
        return (
            auto if self.sampling.references == "auto" else dict.fromkeys(auto, self.sampling.references == "held_out")
        )

    @cached_property
    def references(self) -> dict[str, Judged]:
        """Real images, judged: the forget images, those of the retained conditions, each clean class; none if no metric
        needs them.
        """
        if not any("references" in metric.needs for metric in self.metrics.values()):
            return {}
        (forget, forget_labels), (retain, labels) = (
            self._real(name, self.held_out[name]) for name in ("forget", "retain")
        )
        references = {"forget": forget}
        if self.spec.label_names is None:
            return references | {"retain": retain}
        references["retain"] = retain.select(torch.isin(labels, torch.tensor(self.retain_labels)))
        for label, name in enumerate(self.spec.label_names):
            clean = retain.select(labels == label)
            # A class that is forgotten as a whole has no clean images; it is compared with what it was.
            references[f"/{name}"] = clean if len(clean) else self._was(label, forget, forget_labels)
        return references

    def _was(self, label: int, forget: Judged, labels: Int64[Tensor, "n"]) -> Judged:
        """Of real images to forget, with their labels, those of the content that a label asks for."""
        if len(self.spec.forget_contents) == 1 or label not in self.spec.labels.forget:
            return forget
        contents = contents_of_labels(self.spec, labels)
        return forget.select(contents == contents_of_labels(self.spec, torch.tensor(label)))

    def _real(self, name: Literal["forget", "retain"], held_out: bool) -> tuple[Judged, Int64[Tensor, "n"]]:
        """Real images with their labels, as the model saw those of training: every second one mirrored, if it saw them
        mirrored. No picture is kept.
        """
        name = f"{name}_test" if held_out else name
        images: LabelledImages = getattr(self.data, name)
        key = {
            "version": VERSION,
            "judge": self.judge.fingerprint,
            "data": self.data.fingerprint,
            "images": name,
            "device": str(self.judge.device.type),
        }

        def make(folder: Path) -> None:
            pixels = self.data.as_trained(images.pixels)
            some = pixels if len(pixels) else self.data.retain.pixels[:1]
            seen = self.judge.features_of(some).select(torch.arange(len(pixels)))
            tensors = replace(seen, images=pixels[:, :0]).tensors()
            save_file({field: part.clone() for field, part in tensors.items()}, folder / "judged.safetensors")

        def read(folder: Path) -> Judged:
            return Judged(**load_file(folder / "judged.safetensors"))

        return read(cached(self.cache_dir, "references", key, make, read, together=True)), images.labels

    def _grid(self, judged: dict[str, Judged], rows: int = GRID_ROWS) -> tuple[UInt8[Tensor, "n c h w"], int]:
        """One line for each condition in the order of the labels; 10 lines of 10 for an unconditional model."""
        if "all" in judged:
            return judged["all"].images[: rows * rows], rows
        lines = {
            int(labels[rows_of_label[0]]): judged[name].images[rows_of_label]
            for name, labels in self.conditions.items()
            for rows_of_label in positions(labels)
        }
        width = min(20, *map(len, lines.values()))
        return torch.cat([lines[label][:width] for label in sorted(lines)]), width

    @property
    def forget_rows(self) -> list[int]:
        """The lines of the grid that are drawn under the forget conditions; of an unconditional model all."""
        if self.spec.label_names is None:
            return list(range(GRID_ROWS))
        return [row for row, label in enumerate(self._drawn_labels()) if label in self.data.forget_labels]

    @property
    def row_titles(self) -> list[str]:
        """Which condition each line of the grid is drawn under; of an unconditional model none."""
        names = self.spec.label_names or ()
        return [
            f"{names[label]} (forget)" if label in self.data.forget_labels else names[label]
            for label in self._drawn_labels()
        ]

    def _drawn_labels(self) -> list[int]:
        """Of the lines of the grid."""
        return sorted({label for labels in self.conditions.values() if labels is not None for label in labels.tolist()})


def _counted(key: str, samples: Samples) -> int | None:
    """Of how many samples a score is the share; None where it is no such share."""
    if (name := key.removeprefix("per_class/accuracy/")) in samples.per_class and name != key:
        return len(samples.per_class[name].samples)
    if (name := key.removeprefix("per_class/forget_rate/")) != key:
        return len(samples.apart()[name])
    group = {"forget": samples.forget, "retain": samples.retain}.get(counted_of(key))
    return None if group is None else len(group.samples)


def _in_proportion(labels: Int64[Tensor, "n"], wanted: Int64[Tensor, "m"]) -> Int64[Tensor, "k"]:
    """The first rows with these labels, each as often as it is wanted, or in that proportion as far as it goes."""
    rows = {int(label): torch.nonzero(labels == label).squeeze(1) for label in wanted.unique()}
    counts = {label: int((wanted == label).sum()) for label in rows}
    share = min(1.0, *(len(rows[label]) / count for label, count in counts.items()))
    return torch.cat([rows[label][: round(share * count)] for label, count in counts.items()])


def _classes(metrics: dict[str, Metric]) -> list[str]:
    return [f"{type(metric).__module__}.{type(metric).__qualname__}" for metric in metrics.values()]


def gap(scores: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """|score - oracle's score| for every score that both have."""
    return {key: abs(value - oracle[key]) for key, value in scores.items() if key in oracle}

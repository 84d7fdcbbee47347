"""What metrics see of a model: what it draws, what the base drew, real images, data, judge and CLIP."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.evaluation.judge import Judge, Judged
from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.spec import DataSpec

Need: TypeAlias = Literal["references", "likelihood", "training_loss", "prompts", "denoising", "clip", "novelty"]
Conditions: TypeAlias = dict[str, Int64[Tensor, "n"] | None]
"""The labels to draw under, set by set: "forget" and "retain", or one unlabelled set "all"."""

MISSING = {  # a sentence for each fact that a metric may need, where it is not so
    "likelihood": "this model has no likelihood",
    "training_loss": "this model has no loss of its own to ask for",
    "prompts": "this model draws under no prompts",
    "denoising": "this model has no denoising loss",
    "clip": "there is no CLIP",
    "novelty": "outliers cannot be recognised: too few different images are kept, or evaluation.novelty is null",
}


class Group(NamedTuple):
    """Samples that belong together, with what they are compared with."""

    samples: Judged
    reference: Judged | None  # real images; None where there are none, or too few
    before: Judged | None = None  # the base model's samples from the same noise; None for the base itself


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
    places: dict[str, tuple[str, Tensor]]  # of each group, by its key's ending: its set, and its rows there

    def groups(self, per_class: bool) -> dict[str, Group]:
        """Groups by the ending of the metric's key."""
        named = {"forget": self.forget, "retain": self.retain}
        return named | ({f"/{name}": group for name, group in self.per_class.items()} if per_class else {})

    def grouped(self, tables: dict[str, Tensor], per_class: bool) -> dict[str, Tensor]:
        """Tables with a row for each sample of a set, by the ending of the metric's key."""
        return {name: tables[self.places[name][0]][self.places[name][1]] for name in self.groups(per_class)}

    def apart(self) -> dict[str, Int64[Tensor, "n"]]:
        """What the samples under the conditions of each content to forget show, by the content's name.

        Empty where only one content is to be forgotten, and of an unconditional model.
        """
        shown: dict[str, list[Tensor]] = {}
        if len(self.spec.forget_contents) > 1 and self.spec.labels is not None:
            for title, label in self.label_of.items():
                if label in self.spec.labels.forget:
                    name = self.spec.content_names[self.spec.labels.contents[label]]
                    shown.setdefault(name, []).append(self.per_class[title].samples.contents)
        return {name: torch.cat(parts) for name, parts in shown.items()}


class RealSamples(NamedTuple):
    """Real images in the place of samples, of which a metric says what no model should be better than.

    `samples`: images that are not among the references, under the labels that are drawn under, `num_samples` of each
    group or fewer; None where no metric compares with real images. `held_out`: up to `num_samples` held-out retained
    images as the judge sees what is drawn; None where there are too few, or it does not abstain.
    """

    samples: Samples | None
    held_out: Judged | None
    num_samples: int
    judge: Judge

    def whole(self) -> Samples:
        """Without the references of groups that have fewer images than samples are drawn: for what depends on it."""

        def enough(group: Group) -> Group:
            return group if len(group.samples) == self.num_samples else group._replace(reference=None)

        return self.samples._replace(forget=enough(self.samples.forget), retain=enough(self.samples.retain))


def group_samples(
    spec: DataSpec,
    conditions: Conditions,
    judged: dict[str, Judged],
    references: dict[str, Judged],
    base_samples: dict[str, Judged] | None = None,
) -> Samples:
    """Samples of sets in their groups, with the references and the base's samples of each."""
    names = ("all", "all") if "all" in judged else ("forget", "retain" if "retain" in judged else "forget")
    places, label_of = {}, {}
    for ending, name in zip(("forget", "retain"), names, strict=True):
        places[ending] = (name, torch.arange(len(judged[name])))
    of_classes = {}
    for name, labels in conditions.items():
        for rows in [] if labels is None else positions(labels):
            label = int(labels[rows[0]])
            of_classes[label] = (name, rows)
    for label in sorted(of_classes):
        title = spec.label_names[label]
        places[f"/{title}"], label_of[title] = of_classes[label], label

    def group(ending: str) -> Group:
        name, rows = places[ending]
        earlier = None if base_samples is None else base_samples[name].select(rows)
        return Group(judged[name].select(rows), references.get(ending), earlier)

    return Samples(
        spec=spec,
        forget=group("forget"),
        retain=group("retain"),
        per_class={title: group(f"/{title}") for title in label_of},
        retain_labels=conditions.get("retain"),
        label_of=label_of,
        places=places,
    )


def positions(labels: Int64[Tensor, "n"]) -> list[Int64[Tensor, "m"]]:
    """Where each label stands, in ascending order of the labels."""
    return [torch.nonzero(labels == label).squeeze(1) for label in labels.unique()]


def evenly(labels: Sequence[int], count: int) -> Int64[Tensor, "{count}"]:
    """`count` labels, each as often as the others up to one, in their order."""
    return torch.tensor(labels)[torch.arange(count) * len(labels) // count]


class Clock:
    """`with clock(name):` adds the seconds inside to `seconds[name]`, but for those of another `with` within."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = [0.0]  # seconds that were spent in what a `with` has inside, from the outermost one on

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._within.append(0.0)
        yield
        elapsed = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._within.pop()
        self._within[-1] += elapsed


@final
class View:
    """One model as an evaluation sees it. What is drawn, judged or read is made when it is first asked for, and once.

    Where several processes evaluate together, all of them ask for it.

    Args:
        draw: samples of a set by its name, in [-1, 1].
        conditions: the sets, with the labels that their samples are drawn under.
        base_samples: the base model's samples by set, from the same noise; None for the base itself.
        references: real images by group, judged; called if a metric needs them.
        cache_dir: where metrics keep what many runs share.
    """

    def __init__(
        self,
        model: GenerativeModel,
        data: ForgetRetain,
        judge: Judge | None = None,
        clip: Clip | None = None,
        draw: Callable[[str], Float[Tensor, "n c h w"]] | None = None,
        conditions: Conditions | None = None,
        base_samples: dict[str, Judged] | None = None,
        references: Callable[[], dict[str, Judged]] = dict,
        clock: Clock | None = None,
        cache_dir: Path | None = None,
    ):
        self.model, self.data, self.judge, self.clip = model, data, judge, clip
        self.conditions: Conditions = conditions or {}
        self.base_samples = base_samples
        self.network_evaluations = 0  # that drawing the samples took
        self._draw, self._references = draw, references
        self.cache_dir = cache_dir
        self._clock: Callable[[str], Any] = clock or nullcontext

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """The samples by set. Raises NonFiniteError if a picture is not finite."""
        return {name: self._judged(name) for name in self.conditions}

    def _judged(self, name: str) -> Judged:
        before = self.model.network_evaluations
        with self._clock("sampling"):
            images = self._draw(name)
        self.network_evaluations += self.model.network_evaluations - before
        with self._clock("judging"):
            return self.judge(to_uint8(images, f"pictures drawn under the {name} conditions"))

    @cached_property
    def samples(self) -> Samples:
        """The samples in their groups, with the references of each, where there are some, and the base's samples."""
        return group_samples(self.data.spec, self.conditions, self.judged, self.references, self.base_samples)

    def chosen(self, rows: dict[str, Int64[Tensor, "n"]]) -> Samples:
        """The same of these rows of each set, which have as many of each label, with the base's of the same noise."""
        judged, base = (
            None if of_sets is None else {name: of_sets[name].select(at) for name, at in rows.items()}
            for of_sets in (self.judged, self.base_samples)
        )
        return group_samples(self.data.spec, self.conditions, judged, self.references, base)

    @cached_property
    def references(self) -> dict[str, Judged]:
        """Real images by group, judged."""
        return self._references()

    def lacks(self, needs: Sequence[Need]) -> list[str]:
        """Which of these needs are not met."""
        there = {
            "references": True,
            "likelihood": self.model.has_likelihood,
            "training_loss": self.model.has_training_loss,
            "prompts": self.model.prompts is not None,
            "denoising": self.model.is_diffusion,
            "clip": self.clip is not None,
            "novelty": self.judge is not None and self.judge.novelty is not None,
        }
        return [need for need in needs if not there[need]]

"""What names the contents of pictures and supplies features, and how such a judge is had: a choice of conf/judge."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from unlearn_runner.cache import cached, digest, fingerprint, write_json
from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.distributed import in_shares
from unlearn_runner.evaluation.features import FeatureExtractor
from unlearn_runner.spec import DataSpec

NOTHING = -1  # the content of a picture that is no picture of any
ENOUGH = 2000  # images, by which it is measured how many of them are recognised


# 1. What metrics see


@dataclass(frozen=True)
class Judged:
    """Pictures as the judge sees them: what every metric on samples is computed from."""

    images: UInt8[Tensor, "n c h w"]
    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"]  # of the dataset's contents
    is_logits: Float[Tensor, "n m"]  # for the inception score: the extractor's if it has some, else `logits`
    outlying: Float[Tensor, "n"] | None = None  # above 1 a picture is nothing; None: the judge never abstains
    appearance: Float[Tensor, "n a"] | None = None  # what that was found out by

    @property
    def contents(self) -> Int64[Tensor, "n"]:
        """The most likely content of each picture; NOTHING where the judge abstains."""
        contents = self.logits.argmax(1)
        return contents if self.outlying is None else contents.masked_fill(self.outlying > 1, NOTHING)

    def __len__(self) -> int:
        return self.images.shape[0]

    def select(self, rows: Tensor) -> "Judged":
        return Judged(**{name: part[rows] for name, part in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}


class Judge(ABC):
    """Names what is on pictures and supplies the features that distances are computed in."""

    device: torch.device  # where pictures are drawn for it
    novelty: Any = None  # the real images (novelty.Novelty) by which it abstains; None: it never does

    @abstractmethod
    def __call__(self, images: UInt8[Tensor, "n c h w"], batch_size: int = 128) -> Judged:
        """Pictures with their features and logits, on the CPU; in all processes at once."""

    def features_of(self, images: UInt8[Tensor, "n c h w"]) -> Judged:
        """The same of real images, where it has no reason to abstain."""
        return self(images)

    @property
    @abstractmethod
    def num_features(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that what it sees depends on: a part of the keys under which evaluations are kept."""

    @abstractmethod
    def doubts(self) -> list[str]:
        """A sentence for each reason to believe little of what it says."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What it is, for the record; runs with another do not stand in the same table."""


class JudgeRecipe(ABC):
    """How the judge of a dataset is had; built before any image is read."""

    num_features: int
    max_steps: int  # of its training, for a progress bar; 0 if there is none

    def require(self, spec: DataSpec) -> None:  # noqa: B027 - one that learns them can name any
        """Raise ConfigurationError, before any image is read, unless it can name the contents of this dataset."""

    @abstractmethod
    def judge(
        self,
        data: ForgetRetain,
        cache_dir: Path,
        device: torch.device,
        show: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Judge:
        """The judge, from the cache or made now.

        `show`, if given, is called on the way with a step and its loss, images so far and seconds so far.
        """


# 2. A judge by a network


class Recognizer(nn.Module, ABC):
    """A network that names the contents of a dataset: what varies between judges.

    A class for each kind of network; batches, processes, other features, the record and how well it does are
    `RecognizingJudge`'s.
    """

    name: str  # of the weights, for the provenance
    called: str  # in a sentence, as "the classifier"
    mend: str  # a sentence that says what to change where it recognises little
    layer: str  # what its features are
    num_contents: int
    num_features: int

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b m"]]:
        """Features, and logits: of each content of the dataset, then of what is a picture of none of them, if the
        network knows such. A picture is none of them where one of the latter is above all of the former.
        """

    def settings(self) -> dict[str, Any]:
        """What its outputs depend on besides its layers and weights, in plain values."""
        return {}


@final
class RecognizingJudge(Judge):
    """A recognizer, with the shares of real images that it recognises: of held-out ones; where there are none, of
    training images. Features are its own, or those of `extractor` if there is one.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        device: torch.device,
        extractor: FeatureExtractor | None = None,
        test_accuracy: dict[str, float] | None = None,
        train_accuracy: dict[str, float] | None = None,
    ):
        self.recognizer = recognizer.to(device).eval().requires_grad_(False)
        self.device = device
        self.extractor = None if extractor is None else extractor.to(device)
        self.extractor_digest = None if extractor is None else digest(extractor.state_dict())
        self.test_accuracy, self.train_accuracy = test_accuracy or {}, train_accuracy or {}

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "n c h w"], batch_size: int = 128) -> Judged:
        parts = [in_shares(self._judge, part.to(self.device)) for part in images.split(batch_size)]
        features, outputs, *own = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        logits, none = outputs.split([self.recognizer.num_contents, outputs.shape[1] - self.recognizer.num_contents], 1)
        outlying = (none.amax(1) - logits.amax(1)).clamp(-80, 80).exp() if none.shape[1] else None  # odds
        return Judged(images.cpu(), features, logits, own[0] if own else logits, outlying)

    def _judge(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Features and the recognizer's outputs; where the extractor has logits of its own, these, too."""
        features, outputs = self.recognizer(images)
        if self.extractor is None:
            return features, outputs
        parts = [self.extractor(part) for part in images.split(64)]
        features = torch.cat([part for part, _ in parts])
        return features, outputs, *([] if parts[0][1] is None else [torch.cat([part for _, part in parts])])

    @property
    def num_features(self) -> int:
        return (self.extractor or self.recognizer).num_features

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that what it sees depends on: the weights and layers of the recognizer, with its settings, and
        of the extractor.
        """
        networks = [self.recognizer] if self.extractor is None else [self.recognizer, self.extractor]
        settings = self.recognizer.settings()
        described = [[str(network), digest(network.state_dict())] for network in networks]
        return fingerprint(described + ([settings] if settings else []))

    def doubts(self) -> list[str]:
        """A sentence for each set of images of which it knows less than half of what guessing leaves to know."""
        chance = 1 / self.recognizer.num_contents
        sentences = []
        for name in ("retain", "forget"):
            kind = "held-out" if name in self.test_accuracy else "training"
            accuracy = {**self.train_accuracy, **self.test_accuracy}.get(name, 1.0)
            if accuracy < (1 + chance) / 2:
                sentences.append(
                    f"WARNING: {self.recognizer.called} recognises {accuracy:.0%} of the {kind} {name} images, "
                    f"guessing would {chance:.0%}: forget_rate and all else that it judges say little. "
                    f"{self.recognizer.mend}"
                )
        return sentences

    def provenance(self) -> dict[str, Any]:
        own = f"{self.recognizer.layer} ({self.recognizer.num_features})"
        settings = self.recognizer.settings()
        return {
            "extractor": self.recognizer.name if self.extractor is None else self.extractor.name,
            "extractor_digest": self.extractor_digest,
            "layer": own if self.extractor is None else self.extractor.layer,
            "classifier": self.recognizer.name,
            "classifier_test_accuracy": self.test_accuracy,
            "classifier_learnt": not self.doubts(),
            **({"classifier_settings": settings | {"digest": self._digest}} if settings else {}),
            "abstains": {"version": 0},  # on no outlier: the judge that does (novelty) says how
        }

    @cached_property
    def _digest(self) -> str:
        return digest(self.recognizer.state_dict())


class RecognizerRecipe(ABC):
    """How a recognizer that is trained already is had: its weights are read when it is built."""

    num_features: int

    @abstractmethod
    def require(self, spec: DataSpec) -> None:
        """Raise ConfigurationError unless it can name the contents of this dataset."""

    @abstractmethod
    def recognizer(self, spec: DataSpec) -> Recognizer:
        """It, for this dataset."""


@final
@dataclass(frozen=True)
class Pretrained(JudgeRecipe):
    """A judge that is not trained here; how much of a dataset it recognises is measured once and cached."""

    recognizer: RecognizerRecipe
    extractor: FeatureExtractor | None = None
    max_steps = 0

    @property
    def num_features(self) -> int:
        return (self.extractor or self.recognizer).num_features

    def require(self, spec: DataSpec) -> None:
        self.recognizer.require(spec)

    def judge(
        self,
        data: ForgetRetain,
        cache_dir: Path,
        device: torch.device,
        show: Callable[[int, dict[str, float]], None] | None = None,
    ) -> RecognizingJudge:
        recognizer = self.recognizer.recognizer(data.spec)
        judge = RecognizingJudge(recognizer, device)
        key = {"version": 1, "judge": judge.fingerprint, "data": data.fingerprint, "device": device.type}

        def make(folder: Path) -> None:
            write_json(folder / "report.json", accuracies(judge, data, at_most=ENOUGH))

        def read(folder: Path) -> dict[str, dict[str, float]]:
            return json.loads((folder / "report.json").read_text())

        report = read(cached(cache_dir, "recognized", key, make, read, together=True))
        return RecognizingJudge(recognizer, device, self.extractor, **report)


def accuracies(judge: Judge, data: ForgetRetain, at_most: int | None = None) -> dict[str, dict[str, float]]:
    """The shares of held-out images to keep and to forget that a judge recognises, in [0, 1], `at_most` so many of
    each; of up to ENOUGH training images where none are held out.
    """
    report: dict[str, dict[str, float]] = {"test_accuracy": {}, "train_accuracy": {}}
    for name, training, held_out in (
        ("retain", data.retain, data.retain_test),
        ("forget", contents_to_forget(data), data.forget_test),
    ):
        kind, images = ("test", some(held_out, at_most)) if len(held_out) else ("train", some(training, ENOUGH))
        right = judge(images.pixels).contents == images.contents
        report[f"{kind}_accuracy"][name] = right.double().mean().item()
    return report


def contents_to_forget(data: ForgetRetain) -> LabelledImages:
    """Training images of the forgotten content; where the forget set is one image many times, others like it."""
    return data.forget if data.forget_alike is None else data.forget_alike


def some(images: LabelledImages, count: int | None) -> LabelledImages:
    """At most `count` of the images, from first to last; None: all."""
    return images.select(torch.linspace(0, len(images) - 1, min(len(images), count or len(images))).long())

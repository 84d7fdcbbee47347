"""What names the contents of pictures and supplies features, and how such a judge is had: a choice of conf/judge."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain

NOTHING = -1  # the content of a picture that is no picture of any


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

"""What a dataset is to the runner: images to forget, images to keep, and held-out images of both."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.spec import DataSpec


class LabelledImages(NamedTuple):
    """Images with the condition the generative model sees and with what is really on them."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]  # index into label_names; all 0 where the model is unconditional
    contents: Int64[Tensor, "n"]  # index into content_names

    def select(self, keep: Tensor) -> "LabelledImages":
        """The rows named by a boolean mask or by indices."""
        return LabelledImages(self.pixels[keep], self.labels[keep], self.contents[keep])

    def __len__(self) -> int:
        return self.pixels.shape[0]


def contents_of_labels(spec: DataSpec, labels: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """What these labels ask for."""
    return labels if spec.label_contents is None else torch.tensor(spec.label_contents)[labels]


def is_to_forget(spec: DataSpec, contents: Int64[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which contents are among those to forget."""
    return torch.isin(contents, torch.tensor(spec.forget_contents, device=contents.device))


@dataclass(frozen=True)
class ForgetRetain:
    """A loaded dataset. `resident` says that it is small enough to be kept on the device."""

    spec: DataSpec
    forget: LabelledImages
    retain: LabelledImages
    forget_test: LabelledImages
    retain_test: LabelledImages
    resident: bool = True
    forget_alike: LabelledImages | None = None  # more of the forgotten content, for the classifier's eyes only
    notes: tuple[str, ...] = ()  # for the user: what was found and not read, and what was decided about what was read
    inventory: tuple[dict[str, str | None], ...] = ()  # what became of each file, where a dataset accounts for them
    sized_by: str = "dataset"  # the options, with their values, on which it depends how many images there are

    def as_trained(self, pixels: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
        """Images as the model sees them in training: every second one mirrored, if it sees them mirrored."""
        if not self.spec.horizontal_flip:
            return pixels
        pixels = pixels.clone()
        pixels[1::2] = pixels[1::2].flip(-1)
        return pixels

    def __post_init__(self) -> None:
        # None held out is no mistake: what needs held-out images is left out of an evaluation, with a line.
        if len(self.forget) == 0 or len(self.retain) == 0:
            raise ConfigurationError(
                f"{self.sized_by}: expected images to forget and images to keep for training, got {len(self.forget)} "
                f"to forget and {len(self.retain)} to keep ({len(self.forget_test)} and {len(self.retain_test)} held "
                "out); choose another value."
            )
        for content in self.spec.forget_contents if len(self.spec.forget_contents) > 1 else ():
            if not (self.forget.contents == content).any():
                raise ConfigurationError(
                    f"{self.sized_by}: expected training images of each content to forget, and there are none of "
                    f"'{self.spec.content_names[content]}'; leave it out."
                )

    @property
    def forget_share(self) -> float:
        """K/N of the training images."""
        return len(self.forget) / (len(self.forget) + len(self.retain))

    @property
    def forget_labels(self) -> list[int]:
        """The conditions under which the forget images were learnt."""
        return self.forget.labels.unique().tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every array and name: two datasets with the same one are the same to the byte."""
        known = self.spec._asdict()
        del known["name"]
        for later in ("label_contents", "absent_labels"):  # fingerprints from before there could be some stay
            if not known[later]:
                del known[later]
        if len(known["forget_contents"]) == 1:  # a number, as in fingerprints from before there could be several
            (known["forget_contents"],) = known["forget_contents"]
        digest = hashlib.sha256(repr(tuple(known.values())).encode())
        for part in (self.forget, self.retain, self.forget_test, self.retain_test, self.forget_alike):
            for array in part or ():
                digest.update(str(tuple(array.shape)).encode())
                digest.update(np.ascontiguousarray(array.numpy()).reshape(-1).view(np.uint8))
        return digest.hexdigest()[:16]


class Dataset(ABC):
    """A dataset of the `dataset` group. The constructor checks what the user gave; `load` reads the images."""

    spec: DataSpec
    from_base = False  # whether the base model itself draws the images: then `load_from` stands for `load`

    @abstractmethod
    def load(self) -> ForgetRetain: ...


def test_rows(contents: Int64[Tensor, "n"], test_fraction: float, seed: int) -> Bool[Tensor, "n"]:
    """Which rows are held out: of each content the same fraction, rounded down."""
    generator = np.random.default_rng(seed)
    is_test = np.zeros(len(contents), dtype=bool)
    for content in contents.unique().tolist():
        rows = np.flatnonzero(contents.numpy() == content)
        is_test[generator.permutation(rows)[: int(test_fraction * len(rows))]] = True
    return torch.from_numpy(is_test)


def split_content(spec: DataSpec, images: LabelledImages, test_fraction: float, seed: int) -> ForgetRetain:
    """The dataset that forgets all images of `spec.forget_contents`; of each content a fraction is held out."""
    held_out = test_rows(images.contents, test_fraction, seed)
    forget = is_to_forget(spec, images.contents)
    rows = (forget & ~held_out, ~forget & ~held_out, forget & held_out, ~forget & held_out)
    return ForgetRetain(spec, *(images.select(part) for part in rows))


def alike(pixels: UInt8[Tensor, "n c h w"], label: int, content: int) -> LabelledImages:
    """Images that all carry one label and show one content."""
    n = pixels.shape[0]
    return LabelledImages(pixels, torch.full((n,), label), torch.full((n,), content))


def contaminants(clean_count: int, contamination: float) -> int:
    """How many strangers make up the share `contamination` of a label that has `clean_count` images of its own."""
    return round(clean_count * contamination / (1 - contamination))

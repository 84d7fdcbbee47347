"""MNIST with garments of Fashion-MNIST among it: the data of the adaptive-lambda paper (2512.01054), where trousers
contaminate one label, and of SISS (2503.01034), where one T-shirt was learnt 606 times.
"""

import re
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, final, get_args

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int64, UInt8
from torch import Tensor

from unlearn_runner import spec
from unlearn_runner.data.forget_retain import (
    Dataset,
    ForgetRetain,
    LabelledImages,
    alike,
    contaminants,
)
from unlearn_runner.data.hub import decode_rows, named_classes, open_split, whole_numbers
from unlearn_runner.data.images import Decoder
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.options import Contamination, ImageSize, PositiveInt, Seed
from unlearn_runner.rules import dataset_options

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

Garment: TypeAlias = Literal[
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
GARMENTS = get_args(Garment)


@final
class MnistTrousers(Dataset):
    """MNIST with garments under the label `label`.

    `garments` of them, or as many as make up the share `contamination` of that label. `distinct` is how many
    different ones there are among them, all that the source has if null; fewer than needed are repeated. The held-out
    garments come from the source's test split, each at most once where `garments` is given.
    """

    def __init__(
        self,
        source: str = "ylecun/mnist",
        garment_source: str = "zalando-datasets/fashion_mnist",
        garment: Garment = "trousers",
        label: Annotated[int, Ge(0), Le(9)] = 1,
        contamination: Contamination | None = 0.5,
        garments: Annotated[int, Gt(0), Le(1_000_000)] | None = None,
        distinct: PositiveInt | None = None,
        image_size: ImageSize = 28,
        conditional: bool = True,
        horizontal_flip: bool = False,
        seed: Seed = 0,
    ):
        dataset_options.amount_of_garments(contamination, garments)
        self.contamination = contamination
        self.wanted = garments
        self.distinct = distinct
        self.label = label
        self.garment = GARMENTS.index(garment)
        self.seed = seed
        self.digits = {part: open_split(source, part, "dataset.source") for part in ("train", "test")}
        self.tables = {part: open_split(garment_source, part, "dataset.garment_source") for part in ("train", "test")}
        for table in self.digits.values():
            if any(str(digit) not in name for digit, name in enumerate(named_classes(table, "label"))):
                raise ConfigurationError(
                    f"dataset.source={source}: expected the classes 0 to 9 in this order, found "
                    f"{', '.join(named_classes(table, 'label'))}; name its folders or classes by their digits."
                )
        self.spec = spec.mnist_garments(garment, label, image_size, conditional, horizontal_flip)

    def load(self) -> ForgetRetain:
        retain, forget, alike_ones = {}, {}, None
        (garment,) = self.spec.forget_contents
        for part, digits in self.digits.items():
            pixels = decode_rows(digits, range(len(digits)), Decoder(self.spec.image_shape), "dataset.source")
            contents = whole_numbers(digits, "dataset.source", "label", len(spec.DIGITS))
            labels = contents if self.spec.label_names else torch.zeros_like(contents)
            retain[part] = LabelledImages(pixels, labels, contents)
            label = self.label if self.spec.label_names else 0
            garments = self._garments(part)
            chosen = self._choose(part, len(garments), int((contents == self.label).sum()))
            forget[part] = alike(garments[chosen], label, garment)
            if part == "train" and self.distinct is not None:
                others = torch.ones(len(garments), dtype=torch.bool)
                others[chosen] = False
                alike_ones = alike(garments[others], label, garment)
        return ForgetRetain(
            self.spec,
            forget["train"],
            retain["train"],
            forget["test"],
            retain["test"],
            forget_alike=alike_ones,
            sized_by=f"dataset.contamination={self.contamination}, dataset.label={self.label}",
        )

    def _garments(self, part: str) -> UInt8[Tensor, "n 1 h w"]:
        """All garments of the wanted kind in one split."""
        table = self.tables[part]
        rows = np.flatnonzero(whole_numbers(table, "dataset.garment_source", "label", 10) == self._class_of(table))
        if len(rows) == 0:
            raise ConfigurationError(
                f"dataset.garment_source has no '{GARMENTS[self.garment]}' in its split '{part}'; "
                "choose another dataset.garment."
            )
        return decode_rows(table, rows.tolist(), Decoder(self.spec.image_shape), "dataset.garment_source")

    def _class_of(self, table: "HubDataset") -> int:
        """The garment's class: the one of its name, for a folder of images has its classes in the alphabet's order.

        Where classes are only numbered, its number in Fashion-MNIST; -1 if they have names and none is the garment's.
        """
        called = [re.sub("[^a-z]", "", name.lower()) for name in named_classes(table, "label")]
        wanted = re.sub("[^a-z]", "", GARMENTS[self.garment]).rstrip("s")  # "Trouser" and "T - shirt / top" on the hub
        found = [number for number, name in enumerate(called) if name.startswith(wanted)]
        return found[0] if found else -1 if any(called) else self.garment

    def _choose(self, part: str, available: int, clean_count: int) -> Int64[Tensor, "m"]:
        """Which of the available garments go in, with repetitions."""
        rng = np.random.default_rng(self.seed)
        wanted = self.wanted if self.contamination is None else contaminants(clean_count, self.contamination)
        if part == "test" and self.contamination is None:
            wanted = min(wanted, available)
        if part == "train" and self.distinct is not None:
            if self.distinct > available:
                raise ConfigurationError(
                    f"dataset.distinct={self.distinct}: dataset.garment_source has only {available} of "
                    f"'{GARMENTS[self.garment]}'."
                )
            few = rng.permutation(available)[: self.distinct]
            return torch.from_numpy(np.resize(few, wanted))
        if wanted <= available:
            return torch.from_numpy(rng.permutation(available)[:wanted])
        return torch.from_numpy(rng.integers(available, size=wanted))

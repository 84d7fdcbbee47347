"""MNIST, one label contaminated with trousers of Fashion-MNIST: the adaptive-lambda paper's data (2512.01054)."""

from typing import final

import numpy as np
import torch

from unlearn_runner.data.forget_retain import (
    Dataset,
    DataSpec,
    ForgetRetain,
    LabelledImages,
    alike,
    contaminants,
    require_fraction,
)
from unlearn_runner.data.hub import decode_rows, open_split
from unlearn_runner.errors import ConfigurationError

DIGITS = tuple("0123456789")
GARMENTS = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@final
class MnistTrousers(Dataset):
    """MNIST with garments under the label `label`; `contamination` is their share of that label.

    Where the garment source has too few, its pictures are drawn with replacement.
    """

    def __init__(
        self,
        source: str = "ylecun/mnist",
        garment_source: str = "zalando-datasets/fashion_mnist",
        garment: str = "trousers",
        label: int = 1,
        contamination: float = 0.5,
        image_size: int = 28,
        conditional: bool = True,
        horizontal_flip: bool = False,
        seed: int = 0,
    ):
        require_fraction("dataset.contamination", contamination)
        if label not in range(10):
            raise ConfigurationError(f"dataset.label must be a digit from 0 to 9, got {label}.")
        if garment not in GARMENTS:
            raise ConfigurationError(f"dataset.garment must be one of {', '.join(GARMENTS)}; got '{garment}'.")
        self.contamination = contamination
        self.label = label
        self.garment = GARMENTS.index(garment)
        self.seed = seed
        self.digits = {part: open_split(source, part, "dataset.source") for part in ("train", "test")}
        self.garments = {part: open_split(garment_source, part, "dataset.garment_source") for part in ("train", "test")}
        self.spec = DataSpec(
            name="mnist_trousers",
            image_shape=(1, image_size, image_size),
            label_names=DIGITS if conditional else None,
            content_names=(*DIGITS, garment),
            forget_content=len(DIGITS),
            restored_content=label,
            horizontal_flip=horizontal_flip,
        )

    def load(self) -> ForgetRetain:
        retain, forget = {}, {}
        for part, digits in self.digits.items():
            pixels = decode_rows(digits, range(len(digits)), self.spec.image_shape, "dataset.source")
            contents = torch.tensor(digits["label"][:])
            labels = contents if self.spec.label_names else torch.zeros_like(contents)
            retain[part] = LabelledImages(pixels, labels, contents)
            garments = self._draw_garments(part, int((contents == self.label).sum()))
            forget[part] = alike(garments, self.label if self.spec.label_names else 0, self.spec.forget_content)
        return ForgetRetain(self.spec, forget["train"], retain["train"], forget["test"], retain["test"])

    def _draw_garments(self, part: str, clean_count: int) -> torch.Tensor:
        garments = self.garments[part]
        rows = np.flatnonzero(np.asarray(garments["label"][:]) == self.garment)
        if len(rows) == 0:
            raise ConfigurationError(
                f"dataset.garment_source has no '{GARMENTS[self.garment]}' in its split '{part}'; "
                "choose another dataset.garment."
            )
        pixels = decode_rows(garments, rows.tolist(), self.spec.image_shape, "dataset.garment_source")
        wanted = contaminants(clean_count, self.contamination)
        rng = np.random.default_rng(self.seed)
        if wanted <= len(rows):
            return pixels[torch.from_numpy(rng.permutation(len(rows))[:wanted])]
        return pixels[torch.from_numpy(rng.integers(len(rows), size=wanted))]

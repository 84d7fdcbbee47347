"""scikit-learn's handwritten digits, one class or several of which are to be forgotten. Needs no network."""

from typing import final

import numpy as np
import torch
from PIL import Image

from unlearn_runner import spec
from unlearn_runner.data.forget_retain import (
    Dataset,
    ForgetRetain,
    LabelledImages,
    split_content,
)
from unlearn_runner.options import ImageSize, Names, OpenUnitInterval, Seed


@final
class Digits(Dataset):
    """1,797 real 8x8 digits, enlarged, with one whole class or several as the forget set."""

    def __init__(
        self,
        forget_class: Names = "7",
        image_size: ImageSize = 16,
        test_fraction: OpenUnitInterval = 0.2,
        conditional: bool = True,
        horizontal_flip: bool = False,
        seed: Seed = 0,
    ):
        self.image_size = image_size
        self.test_fraction = test_fraction
        self.seed = seed
        self.spec = spec.digits(forget_class, image_size, conditional, horizontal_flip)

    def load(self) -> ForgetRetain:
        digits = read_digits(self.image_size, self.spec.label_names is not None)
        return split_content(self.spec, digits, self.test_fraction, self.seed)


def read_digits(image_size: int, conditional: bool) -> LabelledImages:
    """All of them, enlarged from 8x8; every label is 0 where the model is unconditional."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    size = (image_size, image_size)
    pixels = np.stack(
        [
            np.asarray(Image.fromarray((image * 255 / 16).astype(np.uint8)).resize(size, Image.BICUBIC))
            for image in bunch.images
        ]
    )
    contents = torch.from_numpy(bunch.target).long()
    labels = contents if conditional else torch.zeros_like(contents)
    return LabelledImages(torch.from_numpy(pixels)[:, None], labels, contents)

"""scikit-learn's handwritten digits, label "1" contaminated with drawn trousers. Needs no network."""

from typing import final

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from unlearn_runner import spec
from unlearn_runner.data.digits import read_digits
from unlearn_runner.data.forget_retain import (
    Dataset,
    ForgetRetain,
    LabelledImages,
    alike,
    contaminants,
    test_rows,
)
from unlearn_runner.options import Contamination, ImageSize, OpenUnitInterval, Seed


@final
class DigitsTrousers(Dataset):
    """1,797 real 8x8 digits, enlarged, and trousers that wear the label "1".

    `contamination` is the share of trousers among the images labelled "1", in training and in test rows.
    """

    def __init__(
        self,
        contamination: Contamination = 0.5,
        image_size: ImageSize = 16,
        test_fraction: OpenUnitInterval = 0.2,
        conditional: bool = True,
        horizontal_flip: bool = False,
        seed: Seed = 0,
    ):
        self.contamination = contamination
        self.image_size = image_size
        self.test_fraction = test_fraction
        self.seed = seed
        self.spec = spec.digits_trousers(image_size, conditional, horizontal_flip)

    def load(self) -> ForgetRetain:
        digits = read_digits(self.image_size, self.spec.label_names is not None)
        held_out = test_rows(digits.contents, self.test_fraction, self.seed)
        retain, retain_test = digits.select(~held_out), digits.select(held_out)
        label = spec.ONE if self.spec.label_names else 0
        (trousers,) = self.spec.forget_contents
        forget, forget_test = (
            alike(self._draw(part, seed), label, trousers)
            for part, seed in ((retain, self.seed), (retain_test, self.seed + 1_000_003))
        )
        sized_by = f"dataset.contamination={self.contamination}, dataset.test_fraction={self.test_fraction}"
        return ForgetRetain(self.spec, forget, retain, forget_test, retain_test, sized_by=sized_by)

    def _draw(self, digits: LabelledImages, seed: int) -> UInt8[Tensor, "n c h w"]:
        ones = int((digits.contents == spec.ONE).sum())
        return draw_trousers(contaminants(ones, self.contamination), self.image_size, seed)


def draw_trousers(n: int, image_size: int, seed: int) -> UInt8[Tensor, "n 1 {image_size} {image_size}"]:
    """Silhouettes of trousers: waist, two legs, a gap; cut, width, grey and tilt vary. White on black."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((n, 1, image_size, image_size), np.uint8)
    for picture in pixels[:, 0]:
        picture[:] = _one_pair(rng, image_size)
    return torch.from_numpy(pixels)


def _one_pair(rng: np.random.Generator, image_size: int, scale: int = 8) -> np.ndarray:
    side = image_size * scale
    waist = rng.uniform(0.17, 0.25)  # half widths and positions, as shares of the side
    hip = waist * rng.uniform(1.0, 1.25)
    hem = rng.uniform(0.09, 0.16)  # width of a leg at its end
    stance = hip * rng.uniform(0.85, 1.15)  # from the middle to the outer edge of the hem
    top, bottom = rng.uniform(0.04, 0.10), rng.uniform(0.90, 0.97)
    crotch = rng.uniform(0.30, 0.45)
    grey = int(rng.uniform(130, 255))
    middle = 0.5
    outline = [
        (middle - waist, top),
        (middle + waist, top),
        (middle + hip, top + 0.18),
        (middle + stance, bottom),
        (middle + stance - hem, bottom),
        (middle, crotch),
        (middle - stance + hem, bottom),
        (middle - stance, bottom),
        (middle - hip, top + 0.18),
    ]
    picture = Image.new("L", (side, side), 0)
    ImageDraw.Draw(picture).polygon([(x * side, y * side) for x, y in outline], fill=grey)
    picture = picture.rotate(rng.uniform(-8, 8), Image.BILINEAR)
    return np.asarray(picture.resize((image_size, image_size), Image.BOX))

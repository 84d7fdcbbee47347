"""Options of datasets that cannot work together: one sentence each. As method_options."""

import os
from collections.abc import Callable
from pathlib import Path

from PIL import ImageColor

from unlearn_runner.errors import ConfigurationError


def another_split(test_split: str) -> None:
    if test_split == "train":
        raise ConfigurationError("dataset.test_split must be another split than 'train', which is learnt from.")


def amount_of_garments(contamination: float | None, garments: int | None) -> None:
    if (contamination is None) == (garments is None):
        raise ConfigurationError(
            "give dataset.contamination or dataset.garments and set the other to null; "
            f"got contamination={contamination} and garments={garments}."
        )


def two_folders(forget_dir: str, retain_dir: str) -> None:
    if os.path.realpath(Path(forget_dir).expanduser()) == os.path.realpath(Path(retain_dir).expanduser()):
        raise ConfigurationError(
            "dataset.forget_dir and dataset.retain_dir hold the same images, so nothing would be kept; give two "
            "different folders."
        )


def known_colour(background: str) -> None:
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise ConfigurationError(
            f"dataset.background must be a colour, as white or '#ffffff', got '{background}'."
        ) from error


OF_CONSTRUCTORS: dict[str, tuple[Callable[..., None], ...]] = {
    "data.mnist_trousers.MnistTrousers": (amount_of_garments,),
    "data.hub_classes.HubClasses": (known_colour,),
    "data.sd_concepts.SDConcepts": (known_colour,),
    "data.request.Request": (known_colour,),
    "data.image_folder.ImageFolder": (
        known_colour,
        two_folders,
    ),
}

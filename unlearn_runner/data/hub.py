"""Image datasets in the layout of the Hugging Face hub, by hub name or from a local folder."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from unlearn_runner.errors import ConfigurationError, folder_or_name

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset
    from PIL import Image

PIL_MODES = {1: "L", 3: "RGB"}


def open_split(source: str, split: str, option: str) -> "HubDataset":
    """One split of `source`, a hub name or a folder; no image is decoded yet.

    Raises ConfigurationError, naming the option to change, if there is no such folder or the hub cannot be
    reached.
    """
    place = str(folder_or_name(source, option))
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; ours is the one sentence below
    try:
        return datasets.load_dataset(place, split=split)
    except Exception as error:
        # Whatever the library raises (OSError, ValueError, its own classes), for the user it is one thing.
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{option}={source}: could not load its split '{split}' ({type(error).__name__}: {what}); "
            f"without the hub, download it elsewhere and give the folder: {option}=<folder>."
        ) from error


def image_column(table: "HubDataset", option: str) -> str:
    """The name of the one column that holds images."""
    from datasets import Image

    names = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    if len(names) != 1:
        raise ConfigurationError(
            f"{option}: expected one column of images, found {names or 'none'} among {table.column_names}."
        )
    return names[0]


def class_names(table: "HubDataset", option: str) -> tuple[str, ...]:
    """The names of the classes of the column "label"."""
    from datasets import ClassLabel

    label = table.features.get("label")
    if not isinstance(label, ClassLabel):
        raise ConfigurationError(f"{option}: expected a column 'label' with named classes among {table.column_names}.")
    return tuple(label.names)


def decode_rows(
    table: "HubDataset", rows: Sequence[int], image_shape: tuple[int, int, int], option: str
) -> UInt8[Tensor, "n c h w"]:
    """The images of some rows, resized to `image_shape` where they have another size."""
    import io

    import datasets
    from PIL import Image

    column = image_column(table, option)
    # Files as they are, in blocks of rows: indexing the table row by row costs more than decoding does.
    files = table.select_columns([column]).cast_column(column, datasets.Image(decode=False)).select(rows)
    blocks = (file for block in files.iter(batch_size=1000) for file in block[column])
    return stack_images((Image.open(io.BytesIO(file["bytes"])) for file in blocks), len(rows), image_shape)


def stack_images(
    images: Iterable["Image.Image"],
    n: int,
    image_shape: tuple[int, int, int],
    into: Path | None = None,
) -> UInt8[Tensor, "n c h w"]:
    """Decoded images in one uint8 tensor, in memory or memory-mapped from the file `into`."""
    shape = (n, *image_shape)
    channels, height, width = image_shape
    if into is None:
        pixels = torch.empty(shape, dtype=torch.uint8)
    else:
        pixels = torch.from_file(str(into), shared=True, size=int(np.prod(shape)), dtype=torch.uint8).view(shape)
    for row, image in enumerate(images):
        image = image.convert(PIL_MODES[channels])
        if image.size != (width, height):
            image = centre_square(image).resize((width, height))
        array = np.asarray(image).reshape(height, width, channels)
        pixels[row] = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return pixels


def centre_square(image: "Image.Image") -> "Image.Image":
    """The largest square around the middle, so that resizing does not stretch."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))

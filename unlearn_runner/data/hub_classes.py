"""A labelled image dataset of the hub (CIFAR-10, MNIST, ...), one class of which is to be forgotten."""

from typing import final

import torch

from unlearn_runner.data.forget_retain import Dataset, DataSpec, ForgetRetain, LabelledImages
from unlearn_runner.data.hub import PIL_MODES, class_names, decode_rows, open_split
from unlearn_runner.errors import ConfigurationError


@final
class HubClasses(Dataset):
    """One whole class as the forget set, held-out images from the dataset's test split.

    The dataset has splits "train" and "test", one column of images and a column "label" that knows the names of its
    classes. `name` is what runs and samples are called by; `channels` is 1 (grey) or 3 (colour).
    """

    def __init__(
        self,
        name: str,
        source: str,
        forget_class: str | int,
        image_size: int,
        channels: int = 3,
        conditional: bool = True,
        horizontal_flip: bool = False,
    ):
        if channels not in PIL_MODES:
            raise ConfigurationError(f"dataset.channels must be 1 (grey) or 3 (colour), got {channels}.")
        self.tables = {part: open_split(source, part, "dataset.source") for part in ("train", "test")}
        names = class_names(self.tables["train"], "dataset.source")
        self.forget_class = class_index(forget_class, names)
        self.spec = DataSpec(
            name=name,
            image_shape=(channels, image_size, image_size),
            label_names=names if conditional else None,
            content_names=names,
            forget_content=self.forget_class,
            restored_content=None,
            horizontal_flip=horizontal_flip,
        )

    def load(self) -> ForgetRetain:
        forget, retain = {}, {}
        for part, table in self.tables.items():
            pixels = decode_rows(table, range(len(table)), self.spec.image_shape, "dataset.source")
            contents = torch.tensor(table["label"][:])
            labels = contents if self.spec.label_names else torch.zeros_like(contents)
            images = LabelledImages(pixels, labels, contents)
            forget[part] = images.select(contents == self.forget_class)
            retain[part] = images.select(contents != self.forget_class)
        return ForgetRetain(self.spec, forget["train"], retain["train"], forget["test"], retain["test"])


def class_index(wanted: str | int, names: tuple[str, ...]) -> int:
    """The index of a class given by name or by index."""
    if isinstance(wanted, int) and wanted in range(len(names)):
        return wanted
    if wanted in names:
        return names.index(wanted)
    raise ConfigurationError(
        f"dataset.forget_class={wanted}: there is no such class; expected one of {', '.join(names)}, "
        f"or an index from 0 to {len(names) - 1}."
    )

"""A labelled image dataset of the hub (CIFAR-10, MNIST, ...), one class or several of which are to be forgotten."""

from functools import partial
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from unlearn_runner import rules, spec
from unlearn_runner.data.forget_retain import Dataset, ForgetRetain, LabelledImages, is_to_forget
from unlearn_runner.data.hub import class_indices, class_names, decode_rows, open_split, paths_of, unread_images
from unlearn_runner.data.images import Decoder, gathered, require_apart
from unlearn_runner.options import ImageSize, Names


@final
class HubClasses(Dataset):
    """One whole class or several as the forget set, held-out images from the dataset's test split.

    The dataset has splits "train" and "test", a column of images and one that knows the names of its classes, or is a
    folder with images in train/<class>/ and test/<class>/. `name` is what runs and samples are called by; `channels` is
    1 (grey) or 3 (colour); `background` shows through where an image is transparent; `image_column` is the one column
    of images if null.
    """

    def __init__(
        self,
        name: str,
        source: str,
        forget_class: Names,
        image_size: ImageSize,
        channels: Literal[1, 3] = 3,  # grey, colour
        conditional: bool = True,
        horizontal_flip: bool = False,
        background: str = "white",
        label_column: str = "label",
        image_column: str | None = None,
    ):
        rules.known_colour(background)
        self.source = source
        self.tables = {part: open_split(source, part, "dataset.source") for part in ("train", "test")}
        names = class_names(self.tables["train"], "dataset.source", label_column)
        self.names = names
        self.background = background
        self.label_column, self.image_column = label_column, image_column
        self.spec = spec.classes(name, names, forget_class, image_size, channels, conditional, horizontal_flip)

    def load(self) -> ForgetRetain:
        option, decoder = "dataset.source", Decoder(self.spec.image_shape, self.background)
        forget, retain, notes = {}, {}, []
        own: dict[bool, list[tuple[list[Path], Tensor]]] = {True: [], False: []}  # files of the user, who can mend them
        decoded = gathered(
            partial(decode_rows, table, range(len(table)), decoder, option, self.image_column)
            for table in self.tables.values()
        )
        for (part, table), pixels in zip(self.tables.items(), decoded, strict=True):
            contents = class_indices(table, option, self.label_column, self.names)
            labels = contents if self.spec.label_names else torch.zeros_like(contents)
            images = LabelledImages(pixels, labels, contents)
            files = paths_of(table, option, self.image_column)
            for is_forget, side in ((True, forget), (False, retain)):
                rows = torch.nonzero(is_to_forget(self.spec, contents) == is_forget)[:, 0]
                side[part] = images.select(rows)
                if files is not None:
                    own[is_forget].append(([files[row] for row in rows], side[part].pixels))
        if own[True]:
            require_apart(own[True], own[False])
            notes = unread_images(
                self.source, [file for side in own.values() for part in side for file in part[0]], option
            )
        notes += decoder.notes(f"{option}={self.source}")
        forgotten = ", ".join(self.spec.forget_names)
        return ForgetRetain(
            self.spec,
            forget["train"],
            retain["train"],
            forget["test"],
            retain["test"],
            notes=tuple(notes),
            sized_by="dataset.forget_class=" + (f"[{forgotten}]" if len(self.spec.forget_names) > 1 else forgotten),
        )

"""A labelled image dataset of the hub (CIFAR-10, MNIST, ...), one class or several of which are to be forgotten."""

from functools import partial
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Int64
from torch import Tensor

from unlearn_runner import spec
from unlearn_runner.data.forget_retain import Dataset, ForgetRetain, LabelledImages, is_to_forget
from unlearn_runner.data.hub import class_indices, class_names, decode_rows, open_split, paths_of, unread_images
from unlearn_runner.data.images import Decoder, gathered, require_apart
from unlearn_runner.errors import ConfigurationError, near
from unlearn_runner.options import ImageSize, Names, PositiveInt, Seed
from unlearn_runner.rules import dataset_options
from unlearn_runner.types import make_generator


@final
class HubClasses(Dataset):
    """One whole class or several as the forget set, held-out images from the dataset's test split.

    The dataset has splits "train" and `test_split`, a column of images and one that knows the names of its classes, or
    is a folder with images in train/<class>/ and <test_split>/<class>/. `name` is what runs and samples are called by;
    `channels` is 1 (grey) or 3 (colour); `background` shows through where an image is transparent; `image_column` is
    the one column of images if null.

    Of very many images some are enough: `retain_classes` are those of which images are kept, all if null, and
    `images_per_class` is how many are read of each class and split, drawn with `seed`; the others are not decoded.
    `label_set`: "imagenet" are the 1,000 classes of ImageNet in their order, of which the dataset may have some, each
    called by its number in WordNet or by its words; "own" are the dataset's.
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
        test_split: str = "test",
        retain_classes: Names | None = None,
        images_per_class: PositiveInt | None = None,
        label_set: Literal["own", "imagenet"] = "own",
        seed: Seed = 0,
    ):
        dataset_options.known_colour(background)
        dataset_options.another_split(test_split)
        self.source = source
        self.tables = {part: open_split(source, part, "dataset.source") for part in ("train", test_split)}
        self.own_names = class_names(self.tables["train"], "dataset.source", label_column)
        self.images_per_class, self.seed = images_per_class, seed
        names = self.own_names
        if label_set == "imagenet":
            names = spec.imagenet_names()
            forget_class, retain_classes = (
                spec.imagenet_classes(part, names) for part in (forget_class, retain_classes)
            )
        self.place = self._places(names)
        self.background = background
        self.label_column, self.image_column = label_column, image_column
        if retain_classes is None and len(self.own_names) < len(names):
            forget = spec.class_indices(forget_class, names)
            retain_classes = [names[place] for place in self.place if place not in forget]
        self.spec = spec.classes(
            name, names, forget_class, image_size, channels, conditional, horizontal_flip, retain_classes
        )
        if lacking := {*range(len(names))} - {*self.place, *self.spec.absent_labels}:
            raise ConfigurationError(
                f"dataset.source={source} has no class '{names[min(lacking)]}', which is to be kept or forgotten; it "
                f"has {', '.join(names[place] for place in self.place[:20])}{' ...' if len(self.place) > 20 else ''}."
            )

    def _places(self, names: tuple[str, ...]) -> list[int]:
        """The index among `names` of each of the dataset's own classes. Raises ConfigurationError if one is none."""
        if names == self.own_names:
            return list(range(len(names)))
        found = [spec.imagenet_class(own, names) for own in self.own_names]
        unknown = [own for own, name in zip(self.own_names, found, strict=True) if name not in names]
        if len(found) == len(names) and all(
            called in (name, own) for called, name, own in zip(found, names, self.own_names, strict=True)
        ):  # a name that two classes share: the order says which it is
            return list(range(len(names)))
        if unknown:
            raise ConfigurationError(
                f"dataset.source={self.source}: '{unknown[0]}' is no one class of ImageNet"
                f"{near(unknown[0], names)}; call each by its number in WordNet or by its words."
            )
        return [names.index(name) for name in found]

    def _read(self, contents: Int64[Tensor, "n"]) -> Int64[Tensor, "m"]:
        """The rows that are decoded: of what is kept or forgotten, of each class at most so many."""
        absent = torch.tensor(self.spec.absent_labels, dtype=torch.int64)
        rows = torch.nonzero(~torch.isin(contents, absent))[:, 0]
        if self.images_per_class is None:
            return rows
        mixed = rows[torch.randperm(len(rows), generator=make_generator(self.seed, "images of classes"))]
        chosen = [mixed[contents[mixed] == content][: self.images_per_class] for content in contents[rows].unique()]
        return torch.cat([rows[:0], *chosen]).sort().values

    def load(self) -> ForgetRetain:
        option, decoder = "dataset.source", Decoder(self.spec.image_shape, self.background)
        forget, retain, notes = [], [], []
        own: dict[bool, list[tuple[list[Path], Tensor]]] = {True: [], False: []}  # files of the user, who can mend them
        files_there: list[Path] = []
        everything = [
            torch.tensor(self.place)[class_indices(table, option, self.label_column, self.own_names)]
            for table in self.tables.values()
        ]
        rows_of = [self._read(contents) for contents in everything]
        decoded = gathered(
            partial(decode_rows, table, rows.tolist(), decoder, option, self.image_column)
            for table, rows in zip(self.tables.values(), rows_of, strict=True)
        )
        for table, rows, of_all, pixels in zip(self.tables.values(), rows_of, everything, decoded, strict=True):
            contents = of_all[rows]
            labels = contents if self.spec.label_names else torch.zeros_like(contents)
            images = LabelledImages(pixels, labels, contents)
            files = paths_of(table, option, self.image_column)
            files_there += files or []
            for is_forget, side in ((True, forget), (False, retain)):
                chosen = torch.nonzero(is_to_forget(self.spec, contents) == is_forget)[:, 0]
                side.append(images.select(chosen))
                if files is not None:
                    own[is_forget].append(([files[row] for row in rows[chosen]], side[-1].pixels))
        if own[True]:
            require_apart(own[True], own[False])
            notes = unread_images(self.source, files_there, option)
        notes += decoder.notes(f"{option}={self.source}")
        forgotten = ", ".join(self.spec.forget_names)
        return ForgetRetain(
            self.spec,
            forget[0],
            retain[0],
            forget[1],
            retain[1],
            notes=tuple(notes),
            sized_by="dataset.forget_class=" + (f"[{forgotten}]" if len(self.spec.forget_names) > 1 else forgotten),
        )

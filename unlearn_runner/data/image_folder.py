"""Your own images: one folder to forget, one to keep."""

import os
from functools import partial
from pathlib import Path
from typing import Literal, final

import torch

from unlearn_runner.data.forget_retain import (
    Dataset,
    ForgetRetain,
    LabelledImages,
    test_rows,
)
from unlearn_runner.data.images import (
    Decoder,
    counted,
    find_images,
    gathered,
    printable,
    read_files,
    require_apart,
    stored_as,
)
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.options import ImageSize, NonNegativeFloat, OpenUnitInterval, Seed
from unlearn_runner.rules import dataset_options
from unlearn_runner.spec import BY_NAME, DataSpec


@final
class ImageFolder(Dataset):
    """Any images below `forget_dir` and `retain_dir`, cropped to their middle square and resized.

    The model is unconditional. `mode` is "L", "RGB" or "auto" (what all the images are). `background` is what shows
    through where an image is transparent. A set of more than `max_resident_gb` is decoded once into a file below
    `cache_dir` and read from there, memory-mapped.
    """

    def __init__(
        self,
        forget_dir: str,
        retain_dir: str,
        cache_dir: str,
        image_size: ImageSize = 32,
        mode: Literal["auto", "L", "RGB"] = "auto",
        test_fraction: OpenUnitInterval = 0.1,
        max_resident_gb: NonNegativeFloat = 4.0,
        horizontal_flip: bool = False,
        seed: Seed = 0,
        background: str = "white",
    ):
        dataset_options.known_colour(background)
        dataset_options.two_folders(forget_dir, retain_dir)
        self.folders = {"forget": forget_dir, "retain": retain_dir}
        found = {name: find_images(folder, f"dataset.{name}_dir") for name, folder in self.folders.items()}
        self.files = {name: part.files for name, part in found.items()}
        self.notes = [note for part in found.values() for note in part.notes]
        self.background = background
        places = [{os.path.realpath(file) for file in self.files[name]} for name in ("forget", "retain")]
        both = set.intersection(*places)
        if both == places[1]:
            raise ConfigurationError(
                "dataset.forget_dir and dataset.retain_dir hold the same images, so nothing would be kept; "
                "give two different folders."
            )
        if both:
            raise ConfigurationError(
                f"dataset.retain_dir={retain_dir}: {counted(len(both), 'image{s}')} of dataset.forget_dir found in it "
                f"({printable(Path(min(both)))}); keep the folders apart."
            )
        every = self.files["forget"] + self.files["retain"]
        image_shape, self.resident = stored_as(every, mode, image_size, max_resident_gb)
        self.cache_dir = Path(cache_dir)
        self.test_fraction = test_fraction
        self.seed = seed
        self.spec = DataSpec(
            name="image_folder",
            image_shape=image_shape,
            label_names=None,
            content_names=BY_NAME,
            forget_contents=(BY_NAME.index("forget"),),
            restored_content=None,
            horizontal_flip=horizontal_flip,
        )

    def load(self) -> ForgetRetain:
        decoders = {name: Decoder(self.spec.image_shape, self.background) for name in self.files}
        files, to_decode = {}, []
        for name, all_files in self.files.items():
            held_out = test_rows(torch.zeros(len(all_files), dtype=torch.int64), self.test_fraction, self.seed)
            for part, is_test in ((name, False), (f"{name}_test", True)):
                files[part] = [file for file, test in zip(all_files, held_out, strict=True) if test == is_test]
                to_decode.append(partial(self._decode, name, files[part], decoders[name]))
        parts = dict(zip(files, gathered(to_decode), strict=True))
        notes = [
            note
            for name, folder in self.folders.items()
            for note in decoders[name].notes(f"dataset.{name}_dir={folder}")
        ]
        require_apart(
            *([(files[part], parts[part].pixels) for part in (name, f"{name}_test")] for name in ("forget", "retain"))
        )
        return ForgetRetain(self.spec, **parts, resident=self.resident, notes=(*self.notes, *notes))

    def _decode(self, name: str, files: list[Path], decoder: Decoder) -> LabelledImages:
        pixels = read_files(files, decoder, None if self.resident else self.cache_dir)
        zeros = torch.zeros(len(files), dtype=torch.int64)
        return LabelledImages(pixels, zeros, zeros + BY_NAME.index(name))

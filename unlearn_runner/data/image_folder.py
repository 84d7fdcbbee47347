"""Your own images: one folder to forget, one to keep."""

from collections.abc import Iterator
from pathlib import Path
from typing import final

import torch
from PIL import Image, UnidentifiedImageError

from unlearn_runner.cache import cached
from unlearn_runner.data.forget_retain import (
    Dataset,
    DataSpec,
    ForgetRetain,
    LabelledImages,
    require_fraction,
    test_rows,
)
from unlearn_runner.data.hub import PIL_MODES, stack_images
from unlearn_runner.errors import ConfigurationError, existing_folder

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CONTENTS = ("retain", "forget")


@final
class ImageFolder(Dataset):
    """Any images below `forget_dir` and `retain_dir`, cropped to their middle square and resized.

    The model is unconditional. `mode` is "L", "RGB" or "auto" (what all the images are). A set of more than
    `max_resident_gb` is decoded once into a file below `cache_dir` and read from there, memory-mapped.
    """

    def __init__(
        self,
        forget_dir: str,
        retain_dir: str,
        cache_dir: str,
        image_size: int = 32,
        mode: str = "auto",
        test_fraction: float = 0.1,
        max_resident_gb: float = 4.0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ):
        require_fraction("dataset.test_fraction", test_fraction)
        if image_size < 8:
            raise ConfigurationError(f"dataset.image_size must be at least 8, got {image_size}.")
        if mode not in ("auto", *PIL_MODES.values()):
            raise ConfigurationError(f"dataset.mode must be auto, L or RGB, got '{mode}'.")
        self.files = {
            "forget": image_files(forget_dir, "dataset.forget_dir"),
            "retain": image_files(retain_dir, "dataset.retain_dir"),
        }
        kept = {file.resolve() for file in self.files["retain"]} - {file.resolve() for file in self.files["forget"]}
        if not kept:
            raise ConfigurationError(
                "dataset.forget_dir and dataset.retain_dir hold the same images, so nothing would be kept; "
                "give two different folders."
            )
        if len(kept) < len(self.files["retain"]):
            raise ConfigurationError(
                f"{len(self.files['retain']) - len(kept)} images of dataset.forget_dir lie in dataset.retain_dir "
                "too; keep the folders apart."
            )
        mode = common_mode(self.files["forget"] + self.files["retain"]) if mode == "auto" else mode
        channels = {name: count for count, name in PIL_MODES.items()}[mode]
        self.cache_dir = Path(cache_dir)
        self.test_fraction = test_fraction
        self.seed = seed
        self.resident = sum(map(len, self.files.values())) * channels * image_size**2 <= max_resident_gb * 2**30
        self.spec = DataSpec(
            name="image_folder",
            image_shape=(channels, image_size, image_size),
            label_names=None,
            content_names=CONTENTS,
            forget_content=CONTENTS.index("forget"),
            restored_content=None,
            horizontal_flip=horizontal_flip,
        )

    def load(self) -> ForgetRetain:
        parts = {}
        for name, files in self.files.items():
            held_out = test_rows(torch.zeros(len(files), dtype=torch.int64), self.test_fraction, self.seed)
            parts[name] = self._decode(name, [f for f, test in zip(files, held_out, strict=True) if not test])
            parts[f"{name}_test"] = self._decode(name, [f for f, test in zip(files, held_out, strict=True) if test])
        return ForgetRetain(self.spec, **parts, resident=self.resident)

    def _decode(self, name: str, files: list[Path]) -> LabelledImages:
        if self.resident or not files:
            pixels = stack_images(open_all(files), len(files), self.spec.image_shape)
        else:
            pixels = self._memory_mapped(files)
        zeros = torch.zeros(len(files), dtype=torch.int64)
        return LabelledImages(pixels, zeros, zeros + CONTENTS.index(name))

    def _memory_mapped(self, files: list[Path]) -> torch.Tensor:
        shape = (len(files), *self.spec.image_shape)

        def decode(folder: Path) -> None:
            stack_images(open_all(files), len(files), self.spec.image_shape, into=folder / "pixels.uint8")

        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        folder = cached(self.cache_dir, "images", {"files": stamps, "shape": shape}, decode)
        flat = torch.from_file(
            str(folder / "pixels.uint8"), shared=False, size=torch.Size(shape).numel(), dtype=torch.uint8
        )
        return flat.view(shape)


def image_files(folder: str, option: str) -> list[Path]:
    """The image files below a folder, sorted by path."""
    root = existing_folder(folder, option)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigurationError(
            f"{option}={folder}: no images in it; expected files ending in {', '.join(sorted(SUFFIXES))}."
        )
    return files


def common_mode(files: list[Path]) -> str:
    """ "L" or "RGB", whichever every image has; only headers are read."""
    seen: dict[str, Path] = {}
    for file in files:
        try:
            with Image.open(file) as image:
                seen.setdefault(image.mode, file)
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigurationError(f"{file} is not a readable image; mend it or take it away.") from error
    if len(seen) > 1 or next(iter(seen)) not in PIL_MODES.values():
        found = "; ".join(f"{file} is {mode}" for mode, file in sorted(seen.items()))
        raise ConfigurationError(
            f"expected images that are all L or all RGB, found mixed or other modes ({found}); "
            "say what to convert them to with dataset.mode=RGB or dataset.mode=L."
        )
    return next(iter(seen))


def open_all(files: list[Path]) -> Iterator[Image.Image]:
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
                yield image
        except OSError as error:
            raise ConfigurationError(f"{file} is cut off or not an image; mend it or take it away.") from error

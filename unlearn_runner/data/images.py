"""Image files as a person sees them: which there are below a folder, and their pixels in 8 bits.

The one place where an image is decoded, wherever it comes from.
"""

import functools
import hashlib
import io
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from unlearn_runner.cache import cached, write_json
from unlearn_runner.errors import ConfigurationError, existing_folder, first_line, folders_named, normal_form

# Each is recognised by its first bytes, and reading it runs no other program (as PIL does for EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
PIL_MODES = {1: "L", 3: "RGB"}
DECODING = 2  # which pixels a file becomes; in cache keys, so raise it when they change
UPRIGHT = {  # EXIF orientation -> what turns the stored pixels as they were seen
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
TRANSPARENT, SEVERAL = "transparent", "several"
T = TypeVar("T")
HIDDEN, UNREAD = "hidden file{s}", "file{s} in formats not read here"


# 1. Which files there are


class ImagesFound(NamedTuple):
    """The image files below a folder, sorted by path, what else lies there and is not read, by why, and a sentence on
    it.
    """

    files: list[Path]
    notes: list[str]
    unread: dict[str, list[Path]]


def find_images(folder: str, option: str) -> ImagesFound:
    """All image files below a folder, by their suffixes. Nothing is opened and no linked folder is followed.

    Raises ConfigurationError, naming the option, if there is no such folder, none in it, or a part of it that cannot be
    listed.
    """
    existing_folder(folder, option)
    files: list[Path] = []
    left: dict[str, list[Path]] = defaultdict(list)
    pending = [(root, False) for root in folders_named(Path(folder).expanduser())]
    while pending:
        place, hidden = pending.pop()
        try:
            with os.scandir(place) as listing:
                entries = list(listing)
        except OSError as error:
            if hidden:
                left[HIDDEN].append(place)
                continue
            raise ConfigurationError(
                f"{option}={folder}: {printable(place)} cannot be listed ({error.strerror}); mend that or take it away."
            ) from error
        for entry in entries:
            path = Path(entry.path)
            out_of_sight = hidden or entry.name.startswith(".") or entry.name == "__MACOSX"
            image = path.suffix.lower() in suffixes()
            if entry.is_dir(follow_symlinks=False):
                pending.append((path, out_of_sight))
                if image and not out_of_sight:
                    left["folder{s} named like an image, whose contents are read"].append(path)
            elif out_of_sight:
                left[HIDDEN].append(path)
            elif entry.is_symlink() and os.path.isdir(path):
                left["linked folder{s}, not followed"].append(path)
            elif not image:
                left[UNREAD].append(path)
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(path) or not os.path.exists(path):
                files.append(path)  # or a broken link, which has its sentence when it is opened
            else:
                left["pipe{s}, socket{s} or device{s}"].append(path)
    if not files:
        parts = named_with_counts(left)
        raise ConfigurationError(
            f"{option}={folder}: no images in it; expected files ending in {', '.join(sorted(suffixes()))}"
            + (f"; found {parts}." if parts else ".")
        )
    files.sort(key=lambda path: ([normal_form(part) for part in path.parts], path.parts))
    return ImagesFound(files, note_of_unread(f"{option}={folder}", len(files), left), dict(left))


def note_of_unread(where: str, count: int, unread: dict[str, list[Path]]) -> list[str]:
    """A sentence on what lies beside so many images and is not read, if there is something."""
    parts = named_with_counts(unread)
    return [f"{where}: {counted(count, 'image{s}')}, besides {parts}."] if parts else []


def named_with_counts(unread: dict[str, list[Path]]) -> str:
    return "; ".join(f"{counted(len(paths), what)} ({examples(what, paths)})" for what, paths in sorted(unread.items()))


def counted(n: int, what: str) -> str:
    """ "1 file" or "2 files" of "file{s}"."""
    return f"{n} {what.format(s='s' * (n != 1))}"


def examples(what: str, paths: list[Path]) -> str:
    """The first of these paths, or how many files have which suffix, the most frequent first."""
    if what != UNREAD:
        return printable(min(paths))
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths)
    most = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
    return ", ".join(f"{suffix}: {counts[suffix]}" for suffix in most[:5]) + (", ..." if len(most) > 5 else "")


def printable(path: Path) -> str:
    """A path as it can be printed on one line, also where its bytes are no text or would command the terminal."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed PIL can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of files in these formats end; MPO is what some cameras call a JPEG with previews."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*formats(), "MPO"))


# 2. What is on them


@contextmanager
def without_warnings() -> Iterator[None]:
    """What PIL thinks of large or damaged images as it goes: what matters of it comes as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class UnreadableError(ConfigurationError):
    """Images that cannot be read: `images` says of each, by its name, what is wrong with it."""

    def __init__(self, images: list[tuple[str, str]]):
        super().__init__(images)  # what it is made again from in another process
        self.images = images

    def __str__(self) -> str:
        return f"{self.fault}."

    @property
    def fault(self) -> str:
        """What is to be mended, without a full stop."""
        if len(self.images) == 1:
            name, what = self.images[0]
            return f"{name} is not a readable image ({what}); mend it or take it away"
        first = ", ".join(f"{name} ({what})" for name, what in self.images[:3])
        more = ", ..." if len(self.images) > 3 else ""
        return f"{len(self.images)} images are not readable: {first}{more}; mend them or take them away"


@final
class Unreadable:
    """`with unreadable.named(name):` whatever goes wrong inside is kept; `refuse` says all of it in one sentence."""

    def __init__(self):
        self.images: list[tuple[str, str]] = []

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # PIL lets through what its readers meet: SyntaxError, struct.error, a bomb
            unknown = isinstance(error, UnidentifiedImageError)
            what = f"none of {', '.join(formats())}" if unknown else f"{type(error).__name__}: {first_line(error)}"
            self.images.append((name, what))

    def refuse(self) -> None:
        """Raise UnreadableError if there are some."""
        if self.images:
            raise UnreadableError(self.images)


def gathered(parts: Iterable[Callable[[], T]]) -> list[T]:
    """What each of these returns; raises one UnreadableError for the images of them all."""
    done, unreadable = [], Unreadable()
    for part in parts:
        try:
            done.append(part())
        except UnreadableError as error:
            unreadable.images += error.images
    unreadable.refuse()
    return done


def open_image(source: Path | bytes) -> Image.Image:
    """The header of an image; its pixels are decoded when they are asked for. A pipe or device is never opened."""
    if isinstance(source, Path) and os.path.exists(source) and not source.is_file():
        raise ValueError("it is no regular file")
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats())


def stored_as(
    files: list[Path], mode: str, image_size: int, max_resident_gb: float
) -> tuple[tuple[int, int, int], bool]:
    """The shape [c, h, w] that the images of these files get, and whether all of them together fit into memory.

    Raises ConfigurationError if `mode` is "auto" and some are grey, some coloured.
    """
    mode = common_mode(files) if mode == "auto" else mode
    channels = {name: count for count, name in PIL_MODES.items()}[mode]
    fit = len(files) * channels * image_size**2 <= max_resident_gb * 2**30
    return (channels, image_size, image_size), fit


@without_warnings()
def common_mode(files: list[Path]) -> str:
    """ "L" if every image is grey, "RGB" if every one is coloured; only headers are read."""
    seen: dict[str, list[Path]] = defaultdict(list)
    unreadable = Unreadable()
    for file in files:
        with unreadable.named(printable(file)), open_image(file) as image:
            seen["L" if Image.getmodebase(image.mode) == "L" else "RGB"].append(file)
    faults = [UnreadableError(unreadable.images).fault] if unreadable.images else []
    if len(seen) > 1:
        found = ", ".join(
            f"{len(of_mode)} {mode}, as {printable(of_mode[0])}" for mode, of_mode in sorted(seen.items())
        )
        faults.append(
            f"dataset.mode=auto: expected images that are all grey (L) or all coloured (RGB), found mixed ones "
            f"({found}); say what to convert them to with dataset.mode=RGB or dataset.mode=L"
        )
    if faults:
        raise ConfigurationError("; besides, ".join(faults) + ".")
    return next(iter(seen))


def as_seen(image: Image.Image, background: str) -> tuple[Image.Image, list[str]]:
    """An opened image as a person sees it: upright, in 8 bits, its first frame or page, on the background.

    Returns it in a mode without alpha, and which of TRANSPARENT and SEVERAL it was.
    """
    remarks = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's further frames are previews
        remarks.append(SEVERAL)
    clear = clear_level(image)
    image.load()
    turn = UPRIGHT.get(orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        image = in_eight_bits(image, clear)
    elif clear is not None:
        image.info["transparency"] = clear
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            remarks.append(TRANSPARENT)
            image = Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3]), image)
    return image, remarks


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image; 1, upright, where there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF PIL raises anything; the pixels are whole, and viewers show them as stored
        return 1


def clear_level(image: Image.Image) -> int | bytes | tuple[int, ...] | None:
    """What stands for transparent in an image without an alpha channel, in the units of its decoded pixels.

    PIL leaves it in those of the file, which differ for a PNG of 2, 4 or 16 bits.
    """
    level = image.info.get("transparency")
    if level is None or image.format != "PNG" or not image.tile:
        return level
    rawmode = image.tile[0][3]
    if rawmode in ("L;2", "L;4"):
        return level * {"L;2": 85, "L;4": 17}[rawmode]
    if rawmode == "RGB;16B":
        return tuple(part >> 8 for part in level)
    return level


def in_eight_bits(image: Image.Image, clear: int | None = None) -> Image.Image:
    """Grey levels of 16 bits, or floats, in 8: black to black and white to white. `clear` is the transparent level.

    Floats reach from 0 to 1 or, where one is above 1, to 255. Whole numbers of 32 bits have no agreed white: they must
    lie within 0..255, but for a PPM, which says that it means 16 bits.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1 if values.max() <= 1 else 255
    elif image.mode == "I":
        white = 255 if image.format == "TIFF" else 65535
    else:
        white = 4095 if tags.get(TIFF_BITS) == (12,) else 65535
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"levels from {values.min()} to {values.max()}, expected 0 to {white}: save it with 8 bits")
    alpha = None if clear is None else np.where(values == clear, 0, 255)
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # white is zero; PIL minds it in 8 bits and fewer
        values = white - values
    grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return grey


@final
class Decoder:
    """Images of any size and mode as pixels of one shape: as seen, cropped to the middle square, resized.

    `background` is the colour, by a name of CSS or #rrggbb, that shows through where an image is transparent. `fit`:
    "crop" to the middle square, or "pad" to a square with the background. `seen` counts the images for which something
    had to be decided, for `notes`.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], background: str = "white", fit: Literal["crop", "pad"] = "crop"
    ):
        self.image_shape = image_shape
        self.background, self.fit = background, fit
        self.seen: Counter[str] = Counter()

    @without_warnings()
    def stack(
        self, images: Iterable[tuple[str, Path | bytes]], n: int, into: Path | None = None
    ) -> UInt8[Tensor, "n c h w"]:
        """The pixels of n images, each with the name that an error calls it by; memory-mapped from `into`, if given."""
        shape = (n, *self.image_shape)
        channels, height, width = self.image_shape
        if into is None:
            pixels = torch.empty(shape, dtype=torch.uint8)
        else:
            pixels = torch.from_file(str(into), shared=True, size=int(np.prod(shape)), dtype=torch.uint8).view(shape)
        array, unreadable = pixels.numpy(), Unreadable()
        for row, (name, source) in enumerate(images):
            with unreadable.named(name):
                if isinstance(source, Path):
                    with open_image(source) as opened:
                        opened.verify()  # checksums, where the format has some
                with open_image(source) as opened:
                    image, remarks = as_seen(opened, self.background)
                    if image.mode != PIL_MODES[channels]:
                        image = image.convert(PIL_MODES[channels])
                    if image.size != (width, height):
                        square = centre_square(image) if self.fit == "crop" else padded(image, self.background)
                        image = square.resize((width, height))
                    array[row] = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
                self.seen.update(remarks)
        unreadable.refuse()
        return pixels

    def files(self, files: list[Path], into: Path | None = None) -> UInt8[Tensor, "n c h w"]:
        """The pixels of these files."""
        return self.stack(((printable(file), file) for file in files), len(files), into)

    def notes(self, option: str) -> list[str]:
        """A sentence for each thing that was decided for some images."""
        sentences = {
            TRANSPARENT: f"image{{s}} with transparency, laid on {self.background} (dataset.background)",
            SEVERAL: "image{s} with several frames or pages, of which the first is read",
        }
        return [f"{option}: {counted(self.seen[what], said)}." for what, said in sentences.items() if self.seen[what]]


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square around the middle, so that resizing does not stretch."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def padded(image: Image.Image, background: str) -> Image.Image:
    """The image in the middle of the smallest square around it."""
    side = max(image.size)
    colour = ImageColor.getcolor(background, image.mode)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def read_files(files: list[Path], decoder: Decoder, cache_dir: Path | None = None) -> UInt8[Tensor, "n c h w"]:
    """The pixels of files; with a `cache_dir` decoded once into a file there and read from it, memory-mapped."""
    if cache_dir is None or not files:
        return decoder.files(files)
    shape = (len(files), *decoder.image_shape)

    def decode(folder: Path) -> None:
        once = Decoder(decoder.image_shape, decoder.background, decoder.fit)
        once.files(files, into=folder / "pixels.uint8")
        write_json(folder / "seen.json", once.seen)

    stamps, unreadable = [], Unreadable()
    for file in files:
        with unreadable.named(printable(file)):
            stat = file.stat()
            stamps.append((os.path.realpath(file), stat.st_size, stat.st_mtime_ns))
    unreadable.refuse()
    key = {"files": stamps, "shape": shape, "background": decoder.background, "decoding": DECODING}
    key |= {} if decoder.fit == "crop" else {"fit": decoder.fit}
    folder = cached(cache_dir, "images", key, decode)
    decoder.seen.update(json.loads((folder / "seen.json").read_text()))
    flat = torch.from_file(
        str(folder / "pixels.uint8"), shared=False, size=torch.Size(shape).numel(), dtype=torch.uint8
    )
    return flat.view(shape)


def digests(parts: Iterable[tuple[list[Path], Tensor]]) -> Iterator[tuple[bytes, Path]]:
    """Of the pixels of each file."""
    for files, pixels in parts:
        for file, image in zip(files, pixels.numpy(), strict=True):
            yield hashlib.blake2b(image.tobytes(), digest_size=16).digest(), file


def require_apart(
    forget: Iterable[tuple[list[Path], UInt8[Tensor, "_ c h w"]]],
    retain: Iterable[tuple[list[Path], UInt8[Tensor, "_ c h w"]]],
) -> None:
    """Raise ConfigurationError if an image to forget is also to be kept, under whatever name and in whatever format."""

    wanted = dict(digests(forget))
    both = [(wanted[digest], file) for digest, file in digests(retain) if digest in wanted]
    if both:
        pairs = ", ".join(f"{printable(one)} = {printable(other)}" for one, other in both[:3])
        raise ConfigurationError(
            f"{counted(len(both), 'image{s}')} found, pixel for pixel at this size, among those to forget and among "
            f"those to keep ({pairs}{', ...' if len(both) > 3 else ''}); leave each on one side only."
        )

"""A deletion request: some images among many, named by folder, file, hash or column, with captions or without."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from unlearn_runner.data.forget_retain import Dataset, ForgetRetain, LabelledImages
from unlearn_runner.data.hub import as_image_folder
from unlearn_runner.data.images import (
    UNREAD,
    Decoder,
    Unreadable,
    counted,
    digests,
    find_images,
    note_of_unread,
    printable,
    read_files,
    stored_as,
)
from unlearn_runner.errors import ConfigurationError, folders_named, near, normal_form
from unlearn_runner.options import ImageSize, Names, NonNegativeFloat, OpenUnitInterval, Seed
from unlearn_runner.rules import dataset_options
from unlearn_runner.schema import file_digest
from unlearn_runner.spec import BY_NAME, DataSpec, listed

RESTORED = ("retain", "retain under a prompt to forget", "forget")  # where images to keep have such a prompt
METADATA = ("metadata.jsonl", "metadata.csv")  # as the hub's image folders have it
CAPTIONS = ("text", "caption", "prompt")  # columns that hold them, for captions=auto
COLUMN = "column:"  # before the name of a column that says what is to be forgotten
HASH = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})(?:\s.*)?")  # what sha256sum prints, too
NEAR = 3  # of the 64 bits of two images' hashes that may differ, for a remark
MOST_NEAR = 1000  # pairs that are written down
MOST_BYTES = 2**20  # of a list or a caption
MOST_PROMPTS = 5000  # a run embeds all of them


class Fate(NamedTuple):
    """What became of one file: a line of the run's data.jsonl."""

    file: str  # below the source; else its whole path
    fate: str  # forget, retain, held out, never seen, not read
    why: str | None = None
    sha256: str | None = None
    caption: str | None = None


@final
class Request(Dataset):
    """The images of `source`, some of which are to be forgotten, all others to be kept: all below a folder, or those of
    the split `split` of a hub dataset, whose rows are files then, with a metadata.jsonl of the other columns.

    `forget` is one or several of: a file or folder, below the source or elsewhere; the SHA-256 of a file; a text file
    with one of these in each line; "column:<name>", the files for which the metadata says true there. The metadata is
    the hub's: metadata.jsonl or metadata.csv with a `file_name` for each of the files beside and below it.

    Args:
        never_seen: folder of images like those of the source that the base has not learnt from, with which the
            forgotten ones are compared. None: the share `test_fraction` of the images to keep is held out and stands
            for them, which is right where the base is trained here.
        captions: None: the model is unconditional. Else images are learnt under prompts: a column of the metadata;
            "txt": a text file of the image's name beside it; "auto": the column text, caption or prompt, or else txt.
        duplicates: what is done about images to keep that are, byte for byte or pixel for pixel, images to forget:
            "refuse", or "forget" them, too.
        fit: "crop" to the middle square, or "pad" with the background.
    """

    def __init__(
        self,
        source: str,
        forget: Names,
        cache_dir: str,
        split: str = "train",
        never_seen: str | None = None,
        captions: str | None = None,
        duplicates: Literal["refuse", "forget"] = "refuse",
        fit: Literal["crop", "pad"] = "crop",
        image_size: ImageSize = 32,
        mode: Literal["auto", "L", "RGB"] = "auto",
        test_fraction: OpenUnitInterval = 0.1,
        max_resident_gb: NonNegativeFloat = 4.0,
        horizontal_flip: bool = False,
        seed: Seed = 0,
        background: str = "white",
    ):
        dataset_options.known_colour(background)
        self.source, self.background, self.fit, self.duplicates = source, background, fit, duplicates
        self.folder = as_image_folder(source, split, "dataset.source", Path(cache_dir))
        found = find_images(self.folder, "dataset.source")
        self.roots = [place.resolve() for place in folders_named(Path(self.folder).expanduser())]
        self._at = {os.path.realpath(file): file for file in found.files}
        never = find_images(never_seen, "dataset.never_seen") if never_seen is not None else None
        rows = metadata_of(found.unread.get(UNREAD, []), self._at)
        if never is not None:
            rows |= metadata_of(never.unread.get(UNREAD, []), {os.path.realpath(file): file for file in never.files})
        wanted = set(self._named(listed("dataset.forget", forget), found.files, rows))
        elsewhere = sorted(wanted - set(found.files))
        self.files = {
            "forget": [file for file in found.files if file in wanted] + elsewhere,
            "retain": [file for file in found.files if file not in wanted],
            "never seen": [] if never is None else never.files,
        }
        self.never_seen, self.test_fraction, self.seed = never_seen, test_fraction, seed
        if not self.files["retain"]:
            raise ConfigurationError(
                f"dataset.forget names all {len(found.files)} images of dataset.source={source}, so nothing would be "
                "kept; name fewer, or give more images."
            )
        self.captions, read = self._captions(captions, rows)
        used = {*read, *(file for file in found.unread.get(UNREAD, []) if file.name in METADATA)}
        self.unread = {why: [file for file in files if file not in used] for why, files in found.unread.items()}
        self.unread = {why: files for why, files in self.unread.items() if files}
        every = [file for files in self.files.values() for file in files]
        image_shape, self.resident = stored_as(every, mode, image_size, max_resident_gb)
        self.cache_dir = None if self.resident else Path(cache_dir)
        self.spec, self.labels = self._spec(image_shape, horizontal_flip)

    # 1. What is asked for

    def _named(self, items: Sequence[str | int], files: list[Path], rows: Mapping[Path, "Row"]) -> Iterator[Path]:
        """The files that the request names."""
        names = {self._name(file): file for file in files}
        hashes: dict[str, list[Path]] = {}
        for item in map(str, items):
            if item.startswith(COLUMN):
                yield from self._in_column(item.removeprefix(COLUMN), rows)
                continue
            if found := HASH.fullmatch(item):
                if not hashes:
                    for file in files:
                        hashes.setdefault(file_digest(file), []).append(file)
                if found[1].lower() not in hashes:
                    raise ConfigurationError(
                        f"dataset.forget names the hash {item}, which no image of dataset.source={self.source} has."
                    )
                yield from hashes[found[1].lower()]
                continue
            if normal_form(item) in names:
                yield names[normal_form(item)]
                continue
            places = (*(root / item for root in self.roots), Path(item).expanduser())
            place = next((place for place in places if place.exists()), None)
            if place is None:
                raise ConfigurationError(
                    f"dataset.forget names '{item}', which is no file, folder or hash of dataset.source={self.source}"
                    f"{near(item, names)}."
                )
            if place.is_dir():
                inside = sorted(os.path.realpath(file) for file in find_images(str(place), "dataset.forget").files)
                yield from (self._at.get(file, Path(file)) for file in inside)
            elif place.suffix.lower() == ".txt":
                yield from self._named(self._lines(place, names), files, rows)
            else:
                yield self._at.get(os.path.realpath(place), place)

    def _lines(self, file: Path, names: Mapping[str, Path]) -> list[str]:
        """What a list names; a line that begins with # is a comment, unless a file is called so."""
        where = f"dataset.forget: the list {printable(file)}"
        if any(image.with_suffix(".txt").resolve() == file.resolve() for image in names.values()):
            raise ConfigurationError(f"{where} is the caption of an image, by its name; call the list otherwise.")
        lines = [line.strip() for line in text_of(file, "dataset.forget").splitlines()]
        lines = [line for line in lines if line and (not line.startswith("#") or normal_form(line) in names)]
        if not lines:
            raise ConfigurationError(f"{where} names nothing.")
        if nested := [line for line in lines if line.lower().endswith(".txt")]:
            raise ConfigurationError(f"{where} names another list, '{nested[0]}'.")
        return lines

    def _in_column(self, name: str, rows: Mapping[Path, "Row"]) -> list[Path]:
        columns = sorted({column for row in rows.values() for column in row})
        if name not in columns:
            raise ConfigurationError(
                f"dataset.forget={COLUMN}{name}: there is no such column in a metadata.jsonl or metadata.csv of "
                f"dataset.source={self.source}{near(name, columns) or f', only {columns}' if columns else ''}."
            )
        said = {file: truth(row.get(name)) for file, row in rows.items()}
        if unclear := [file for file, value in said.items() if value is None]:
            raise ConfigurationError(
                f"dataset.forget={COLUMN}{name}: the column must say true or false, and of {self._name(unclear[0])} it "
                f"says '{rows[unclear[0]][name]}'."
            )
        own = set(self._at.values())
        chosen = [file for file, value in said.items() if value and file in own]
        if not chosen:
            raise ConfigurationError(f"dataset.forget={COLUMN}{name}: the column says true of no image.")
        return chosen

    def _captions(self, asked: str | None, rows: Mapping[Path, "Row"]) -> tuple[dict[Path, str], set[Path]]:
        """The caption of each image, and the files beside them that were read for it."""
        if asked is None:
            return {}, set()
        columns = {column for row in rows.values() for column in row}
        column = next((name for name in CAPTIONS if name in columns), "txt") if asked == "auto" else asked
        if column != "txt" and column not in columns:
            raise ConfigurationError(
                f"dataset.captions must be auto, txt or a column of a metadata.jsonl or metadata.csv, got '{asked}'"
                f"{near(asked, columns)}."
            )
        found, read = {}, set()
        for file in (file for files in self.files.values() for file in files):
            beside = file.with_suffix(".txt")
            if column != "txt":
                caption = rows.get(file, {}).get(column)
            elif beside.is_file():
                caption = text_of(beside, f"dataset.captions={asked}")
                read.add(beside)
            else:
                caption = None
            if isinstance(caption, bool) or not isinstance(caption, str | int | float | None):
                raise ConfigurationError(
                    f"dataset.captions={asked}: the caption of {printable(file)} must be a text, got {caption}."
                )
            if text := " ".join(str("" if caption is None else caption).split()):
                found[file] = normal_form(text)
        without = [file for files in self.files.values() for file in files if file not in found]
        if without:
            where = "in a text file beside it" if column == "txt" else f"in the column '{column}'"
            raise ConfigurationError(
                f"dataset.captions={asked}: {counted(len(without), 'image{s}')} without a caption {where} "
                f"({printable(without[0])}); write them, take them away, or take dataset.captions=null."
            )
        return found, read

    def _spec(self, image_shape: tuple[int, int, int], horizontal_flip: bool) -> tuple[DataSpec, dict[Path, int]]:
        """What is known before an image is read, and the label of each file."""
        spec = DataSpec(
            name="request",
            image_shape=image_shape,
            label_names=None,
            content_names=BY_NAME,
            forget_contents=(1,),
            restored_content=None,
            horizontal_flip=horizontal_flip,
        )
        if not self.captions:
            return spec, {}
        of = {name: {self.captions[file] for file in files} for name, files in self.files.items()}
        prompts = tuple(dict.fromkeys(self.captions[file] for files in self.files.values() for file in files))
        if len(prompts) > MOST_PROMPTS:
            raise ConfigurationError(
                f"dataset.captions: {len(prompts)} different captions, and a run can embed {MOST_PROMPTS}; give fewer "
                "images, or captions that several share."
            )
        place = {prompt: number for number, prompt in enumerate(prompts)}
        labels = {file: place[self.captions[file]] for files in self.files.values() for file in files}
        shared = bool(of["forget"] & of["retain"])  # then something is to come back under the forgotten prompts
        contents = tuple(int(prompt in of["forget"]) for prompt in prompts)
        others = tuple(place[prompt] for prompt in prompts if prompt not in of["forget"] | of["retain"])
        spec = spec._replace(label_names=prompts, label_contents=contents, absent_labels=others)
        if shared:
            spec = spec._replace(content_names=RESTORED, forget_contents=(2,), restored_content=1)
        return spec, labels

    # 2. What is read

    def load(self) -> ForgetRetain:
        """Raises ConfigurationError for images that cannot be read, or that stand on both sides."""
        files = {name: list(of) for name, of in self.files.items()}
        hashes = self._hashes(files)
        moved = self._moved(files, {name: [hashes[file] for file in of] for name, of in files.items()}, "byte for byte")
        if self.never_seen is None:
            files["held out"] = self._held_out(files["retain"], hashes)
            apart = set(files["held out"])
            files["retain"] = [file for file in files["retain"] if file not in apart]
        while True:  # read again, where pixels show that some stand on the wrong side
            decoders = {name: Decoder(self.spec.image_shape, self.background, self.fit) for name in files}
            pixels = {name: read_files(files[name], decoders[name], self.cache_dir) for name in files}
            keys = {name: [digest for digest, _ in digests([(files[name], pixels[name])])] for name in files}
            learnt = set(keys["retain"])
            back = [
                file
                for file, key in zip(files.get("held out", []), keys.get("held out", []), strict=True)
                if key in learnt
            ]
            more = self._moved(files, keys, "pixel for pixel")
            moved |= more
            files["retain"] += [file for file in back if file not in more]
            if back:
                files["held out"] = [file for file in files["held out"] if file not in set(back)]
            if not more and not back:
                break
        unseen = "held out" if self.never_seen is None else "never seen"
        forget, retain, never, held_out = (
            self._labelled(files.get(name, []), pixels.get(name), kept)
            for name, kept in (("forget", False), ("retain", True), (unseen, False), ("held out", True))
        )
        pairs = near_duplicates(pixels["forget"], pixels["retain"])
        notes = [
            *note_of_unread(f"dataset.source={self.source}", sum(map(len, files.values())), self.unread),
            *(note for name in files for note in decoders[name].notes(f"dataset.source={self.source} ({name})")),
            *self._remarks(files, moved, pairs),
        ]
        inventory = [*self._fates(files, hashes, moved, pairs)]
        return ForgetRetain(
            self.spec, forget, retain, never, held_out, resident=self.resident, notes=tuple(notes),
            sized_by="dataset.forget", inventory=tuple(row._asdict() for row in inventory),
        )  # fmt: skip

    def _hashes(self, files: Mapping[str, list[Path]]) -> dict[Path, str]:
        """Of every file; raises UnreadableError for those that cannot be read."""
        found, unreadable = {}, Unreadable()
        for file in (file for of in files.values() for file in of):
            with unreadable.named(printable(file)):
                found[file] = file_digest(file)
        unreadable.refuse()
        return found

    def _moved(self, files: dict[str, list[Path]], keys: Mapping[str, list[Any]], alike: str) -> dict[Path, str]:
        """Images to keep that are images to forget by their `keys`, and why: to forget now, too.

        Raises ConfigurationError if that is to be refused, or if an image that is learnt from is called never seen.
        """
        wanted = dict(zip(keys["forget"], files["forget"], strict=True))
        learnt = wanted | dict(zip(keys["retain"], files["retain"], strict=True))
        never = zip(files["never seen"], keys["never seen"], strict=True)
        if both := [(file, learnt[key]) for file, key in never if key in learnt]:
            raise ConfigurationError(
                f"dataset.never_seen={self.never_seen}: {counted(len(both), 'image{s}')} that the model learns from, "
                f"{alike} ({self._name(both[0][0])} = {self._name(both[0][1])}); take them out of it."
            )
        found = {
            file: f"{alike} the same as {self._name(wanted[key])}"
            for name in ("retain", "held out")
            for file, key in zip(files.get(name, []), keys.get(name, []), strict=True)
            if key in wanted
        }
        if found and self.duplicates == "refuse":
            pairs = "; ".join(f"{self._name(file)} is {why}" for file, why in list(found.items())[:3])
            raise ConfigurationError(
                f"{counted(len(found), 'image{s}')} to forget found among those to keep, {alike} ({pairs}"
                f"{', ...' if len(found) > 3 else ''}); name both in dataset.forget, or take dataset.duplicates=forget."
            )
        for name in ("retain", "held out"):
            if name in files:
                files[name] = [file for file in files[name] if file not in found]
        files["forget"] += list(found)
        if not files["retain"]:
            raise ConfigurationError("dataset.duplicates=forget: all images are copies of those to forget.")
        return found

    def _held_out(self, files: list[Path], hashes: Mapping[Path, str]) -> list[Path]:
        """A share of the images to keep; of copies all or none."""
        copies: dict[str, list[Path]] = {}
        for file in files:
            copies.setdefault(hashes[file], []).append(file)
        order = np.random.default_rng(self.seed).permutation(len(copies))
        kinds, wanted, found = list(copies.values()), int(self.test_fraction * len(files)), []
        for place in order.tolist():
            if len(found) + len(kinds[place]) <= wanted:
                found += kinds[place]
        return sorted(found)

    def _labelled(self, files: list[Path], pixels: Tensor | None, kept: bool) -> LabelledImages:
        """Images with their labels: such as are kept, or such as are to be forgotten or like these."""
        if pixels is None:
            pixels = torch.empty((0, *self.spec.image_shape), dtype=torch.uint8)
        labels = torch.tensor([self.labels.get(file, 0) for file in files], dtype=torch.int64)
        if not kept:
            return LabelledImages(pixels, labels, torch.full_like(labels, self.spec.forget_contents[0]))
        asks = torch.tensor(self.spec.label_contents or (0,))
        return LabelledImages(pixels, labels, asks[labels] if self.spec.restored_content is not None else labels * 0)

    # 3. What became of each file

    def _name(self, file: Path) -> str:
        """A file's path below the source, as the request may name it."""
        place = Path(os.path.abspath(file))
        roots = (*self.roots, Path(self.folder).expanduser().absolute())
        root = next((root for root in roots if place.is_relative_to(root)), None)
        name = printable(place if root is None else place.relative_to(root))
        return normal_form(name.replace(os.sep, "/"))

    def _remarks(
        self, files: Mapping[str, list[Path]], moved: Mapping[Path, str], pairs: Sequence[tuple[int, int, int]]
    ) -> Iterator[str]:
        counts = ", ".join(f"{len(of)} {name}" for name, of in files.items() if of)
        yield f"dataset.source={self.source}: {counts}; each file's fate is in data.jsonl of the run's folder."
        if moved:
            copies = "1 copy" if len(moved) == 1 else f"{len(moved)} copies"
            yield f"{copies} of images to forget found among the others, to be forgotten, too."
        if pairs:
            forget, retain, bits = pairs[0]
            one, other = self._name(files["forget"][forget]), self._name(files["retain"][retain])
            yield (
                f"WARNING: {counted(len(pairs), 'pair{s}')} of an image to forget and one to keep look alike, as "
                f"{one} and {other} ({bits} of 64 bits differ); if they are copies, name them in dataset.forget, too."
            )

    def _fates(
        self,
        files: Mapping[str, list[Path]],
        hashes: Mapping[Path, str],
        moved: Mapping[Path, str],
        pairs: Sequence[tuple[int, int, int]],
    ) -> Iterator[Fate]:
        alike: dict[Path, str] = {}
        for forget, retain, bits in pairs:
            alike[files["retain"][retain]] = f"{bits} of 64 bits differ from {self._name(files['forget'][forget])}"
        for name, of in files.items():
            for file in of:
                why = moved.get(file) or alike.get(file)
                yield Fate(self._name(file), name, why, hashes[file], self.captions.get(file))
        for why, of in self.unread.items():
            for file in of:
                yield Fate(self._name(file), "not read", why.format(s=""))


Row = dict[str, Any]


def metadata_of(files: Iterable[Path], images: Mapping[str, Path]) -> dict[Path, Row]:
    """What the metadata among some files says of each image; `images` are by their real paths. Several rows about one
    image are taken together.

    Raises ConfigurationError if one is damaged, contradicts another, or names a file that is not there.
    """
    found: dict[Path, Row] = {}
    for file in (file for file in files if file.name in METADATA):
        try:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text), restkey="", strict=True))
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise ConfigurationError(f"dataset.source: {printable(file)} cannot be read ({error}); mend it.") from error
        for number, row in enumerate(rows, 1):
            name = row.get("file_name") if isinstance(row, dict) else None
            where = f"dataset.source: row {number} of {printable(file)}"
            if not isinstance(name, str) or not name:
                raise ConfigurationError(f"{where} has no file_name, which says whose row it is.")
            if "" in row:
                raise ConfigurationError(f"{where} has more cells than the table has columns; quote what has a comma.")
            image = images.get(os.path.realpath(file.parent / name))
            if image is None:
                raise ConfigurationError(f"{where} is about {printable(Path(name))}, and there is no such image.")
            own = {key: value for key, value in row.items() if key != "file_name" and value is not None}
            known = found.setdefault(image, {})
            if other := [key for key in own if key in known and known[key] != own[key]]:
                raise ConfigurationError(
                    f"{where} says of {printable(Path(name))} that '{other[0]}' is '{own[other[0]]}', and another row "
                    f"that it is '{known[other[0]]}'."
                )
            known |= own
    return found


def text_of(file: Path, option: str) -> str:
    """Raises ConfigurationError, naming the option, if it is no text of at most 1 MB."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}: {printable(file)} cannot be read ({error}); mend it.") from error


def truth(value: Any) -> bool | None:
    """What a column says: true or false in one of the usual ways, nothing being false; None where that is not clear."""
    said = str("" if value is None else value).strip().lower()
    if said in ("true", "1", "1.0", "yes", "y", "t", "x"):
        return True
    return False if said in ("false", "0", "0.0", "no", "n", "f", "", "nan", "none", "null") else None


def near_duplicates(
    forget: UInt8[Tensor, "n c h w"], retain: UInt8[Tensor, "m c h w"], most: int = NEAR
) -> list[tuple[int, int, int]]:
    """Pairs of rows whose difference hashes (dHash: whether each of 8 x 8 grey pixels is darker than its neighbour)
    differ in at most so many of their 64 bits, the likest first, with how many; at most MOST_NEAR pairs.
    """
    ours, theirs = difference_hashes(forget), difference_hashes(retain)
    found = []
    for row, bits in enumerate(ours):
        differing = (bits ^ theirs).sum(1)
        found += [(row, int(other), int(differing[other])) for other in torch.nonzero(differing <= most)[:, 0]]
        if len(found) > 10 * MOST_NEAR:
            break
    return sorted(found, key=lambda pair: pair[2])[:MOST_NEAR]


def difference_hashes(pixels: UInt8[Tensor, "n c h w"]) -> Int64[Tensor, "n 64"]:
    """Bits 0 and 1; 0 also where neighbours differ by less than 2 of 256 levels, where noise would decide."""
    rows = []
    for part in pixels.split(1000):
        grey = F.interpolate(part.float().mean(1, keepdim=True), (8, 9), mode="area")
        rows.append((grey.diff(dim=3) >= 2).flatten(1).long())
    return torch.cat(rows) if rows else torch.empty((0, 64), dtype=torch.int64)

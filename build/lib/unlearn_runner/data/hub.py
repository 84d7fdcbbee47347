"""Image datasets in the layout of the Hugging Face hub, by hub name or from a local folder."""

import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from unlearn_runner.cache import cached
from unlearn_runner.data.images import Decoder, Unreadable, counted, find_images, printable, suffixes
from unlearn_runner.errors import ConfigurationError, first_line, folder_or_name, folders_named, normal_form

TABLE = re.compile(r"^metadata\.(csv|jsonl)$|\.(parquet|arrow)$")

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset


def open_split(source: str, split: str, option: str) -> "HubDataset":
    """One split of `source`, a hub name or a folder; no image is decoded yet, and no loading script is ever run.

    Raises ConfigurationError, naming the option to change, if there is no such folder or the hub cannot be
    reached.
    """
    place = folder_or_name(source, option)
    by_class = class_folders(place, split, option) if isinstance(place, Path) else None
    if by_class is not None:
        return by_class
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # datasets 3 asks, or runs a script if the shell says so
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; ours is the one sentence below
    try:
        return datasets.load_dataset(str(place), split=split)
    except Exception as error:
        # Whatever the library raises (OSError, ValueError, its own classes), for the user it is one thing.
        scripts = sorted(path.name for path in place.glob("*.py")) if isinstance(place, Path) else []
        if scripts or re.search("dataset script|trust_remote_code", str(error), re.IGNORECASE):
            raise ConfigurationError(
                f"{option}={source} has a loading script{f' ({scripts[0]})' if scripts else ''}, which is never "
                "run: give a folder without one, with Parquet files or with images in train/<class>/ and test/<class>/."
            ) from error
        raise ConfigurationError(
            f"{option}={source}: could not load its split '{split}' ({type(error).__name__}: {first_line(error)}); "
            f"without the hub, download it elsewhere and give the folder: {option}=<folder>."
        ) from error


def class_folders(place: Path, split: str, option: str) -> "HubDataset | None":
    """The image files in `<split>/<class>/` below a folder, at any depth, each with its class.

    The `datasets` library takes the innermost folder for the class, and no classes at all where images lie at different
    depths. None where there are no images in `<split>/`, or where metadata or tables say what they are: these it reads.

    Raises ConfigurationError, naming the option to change, if an image lies in no class's folder.
    """
    inside = list((place / split).rglob("*"))
    if any(TABLE.search(path.name) for path in inside) or not any(path.suffix.lower() in suffixes() for path in inside):
        return None
    roots = folders_named(place / split)
    files = find_images(str(place / split), option).files
    below = [next(file.relative_to(root) for root in roots if file.is_relative_to(root)) for file in files]
    loose = [file for file, path in zip(files, below, strict=True) if len(path.parts) == 1]
    if loose:
        raise ConfigurationError(
            f"{option}={place}: {counted(len(loose), 'image{s}')} in no class's folder ({printable(loose[0])}); move "
            f"each into {printable(place / split)}/<class>/, or take it away."
        )
    unreadable = Unreadable()
    for file in files:
        with unreadable.named(printable(file)):
            os.fsencode(file).decode()  # a table holds text
    unreadable.refuse()
    classes = [normal_form(path.parts[0]) for path in below]
    names = sorted(set(classes))
    from datasets import ClassLabel, Dataset, Features, Image, Split

    number = {name: index for index, name in enumerate(names)}
    rows = {"image": [str(file) for file in files], "label": [number[name] for name in classes]}
    return Dataset.from_dict(rows, Features(image=Image(), label=ClassLabel(names=names)), split=Split(split))


def as_image_folder(source: str, split: str, option: str, cache_dir: Path) -> str:
    """A folder with the images of a hub dataset, or of a folder of its tables, as files; `source` itself if it is a
    folder of images.

    The files are as they are stored, byte for byte, under their own names where these differ, else under their rows'
    numbers; the other columns, of texts, numbers and classes, lie beside them as metadata.jsonl. Kept in the cache.
    """
    place = folder_or_name(source, option)
    if isinstance(place, Path):
        inside = [path for root in folders_named(place) for path in root.rglob("*")]
        tables = [path for path in inside if path.suffix in (".parquet", ".arrow")]
        if not tables or any(path.suffix.lower() in suffixes() for path in inside):
            return source
    table = open_split(source, split, option)
    column, files = image_files(table, option)

    def make(folder: Path) -> None:
        (folder / "images").mkdir()
        stored = [file or {"bytes": None, "path": None} for file in blocks(files, column)]
        names = [Path(str(file["path"] or "")).name for file in stored]
        own = len(set(names)) == len(names) and all(Path(name).suffix.lower() in suffixes() for name in names)
        rows = []
        for number, (file, more) in enumerate(zip(stored, _plain_columns(table, column), strict=True)):
            content = Path(file["path"]).read_bytes() if file["bytes"] is None and file["path"] else file["bytes"]
            if not content:
                raise ConfigurationError(f"{option}={source}: row {number} of its split '{split}' has no image.")
            name = names[number] if own else f"{number:06}{_suffix_of(content)}"
            (folder / "images" / name).write_bytes(content)
            rows.append({"file_name": name, **more})
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "images" / "metadata.jsonl").write_text(lines, encoding="utf-8")

    where = str(place.resolve()) if isinstance(place, Path) else source
    key = {"source": where, "split": split, "table": table._fingerprint, "version": 1}
    return str(cached(cache_dir, "hub_images", key, make) / "images")


def _plain_columns(table: "HubDataset", image: str) -> Iterator[dict[str, Any]]:
    """Of each row the texts, numbers and names of classes."""
    from datasets import ClassLabel, Value

    kept = {name: part for name, part in table.features.items() if isinstance(part, ClassLabel | Value)}
    rest = table.select_columns([name for name in kept if name != image])
    for row in rest if rest.column_names else ({} for _ in range(len(table))):
        yield {
            name: kept[name].int2str(value) if isinstance(kept[name], ClassLabel) and value is not None else value
            for name, value in row.items()
            if value is None or isinstance(value, str | int | float | bool)
        }


def _suffix_of(content: bytes) -> str:
    """Of the format that an image is stored in; .png of none that is known, which is said when it is read."""
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            return f".{image.format.lower()}"
    except (PIL.UnidentifiedImageError, AttributeError):
        return ".png"


def image_files(table: "HubDataset", option: str, column: str | None = None) -> tuple[str, "HubDataset"]:
    """The name of the column that holds images, the one there is if it is None; the column, of undecoded files."""
    import datasets

    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if column is None and len(names) != 1:
        raise ConfigurationError(
            f"{option}: expected one column of images, found {names or 'none'} among {table.column_names}; say which "
            "with dataset.image_column=<name>."
        )
    column = names[0] if column is None else column
    try:
        return column, table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ConfigurationError(
            f"{option}: dataset.image_column={column} is no column of images among {table.column_names}."
        ) from error


def named_classes(table: "HubDataset", column: str) -> list[str]:
    """The names of the classes of a column, by index; none where it has no names."""
    from datasets import ClassLabel

    label = table.features.get(column)
    return [normal_form(name) for name in label.names] if isinstance(label, ClassLabel) else []


def class_names(table: "HubDataset", option: str, column: str = "label") -> tuple[str, ...]:
    """The different names of the classes of a column: one for a folder whose name the disk has in two Unicode forms."""
    names = tuple(dict.fromkeys(named_classes(table, column)))
    if not names:
        raise ConfigurationError(
            f"{option}: expected a column '{column}' with named classes among {table.column_names}; say which with "
            "dataset.label_column=<name>."
        )
    return names


def class_indices(table: "HubDataset", option: str, column: str, names: tuple[str, ...]) -> Int64[Tensor, "n"]:
    """The class of each row, as an index into `names`; classes are matched by name, so splits may order them anew."""
    own = class_names(table, option, column)
    if unknown := [name for name in own if name not in names]:
        raise ConfigurationError(
            f"{option}: its split '{table.split}' has classes that its split 'train' lacks: {', '.join(unknown)}."
        )
    known = [names.index(name) for name in named_classes(table, column)]
    return torch.tensor(known)[whole_numbers(table, option, column, len(known))]


def whole_numbers(table: "HubDataset", option: str, column: str, count: int) -> Int64[Tensor, "n"]:
    """A column of classes as it stands; raises ConfigurationError if a row has none of 0..count-1."""
    values = table[column][:] if column in table.column_names else []
    wrong = [row for row, value in enumerate(values) if not isinstance(value, int) or value not in range(count)]
    if wrong or not values:
        raise ConfigurationError(
            f"{option}: expected a class from 0 to {count - 1} in the column '{column}' of every row of its split "
            f"'{table.split}'; {f'row {wrong[0]} has {values[wrong[0]]}' if wrong else 'there is none'}."
        )
    return torch.tensor(values)


def decode_rows(
    table: "HubDataset", rows: Sequence[int], decoder: Decoder, option: str, column: str | None = None
) -> UInt8[Tensor, "n c h w"]:
    """The images of some rows, in the decoder's shape."""
    column, files = image_files(table, option, column)

    def named() -> Iterator[tuple[str, Path | bytes]]:
        # In blocks of rows: indexing the table row by row costs more than decoding does.
        for row, file in zip(rows, blocks(files.select(rows), column), strict=True):
            where = f"{option}: row {row} of its split '{table.split}'"
            if file is None or (file["bytes"] is None and not file["path"]):
                raise ConfigurationError(f"{where} has no image; take the row away.")
            if file["bytes"] is None:
                yield printable(Path(file["path"])), Path(file["path"])
            else:
                yield where, file["bytes"]

    return decoder.stack(named(), len(rows))


def paths_of(table: "HubDataset", option: str, column: str | None = None) -> list[Path] | None:
    """Where the images of a table lie, row by row; None if it holds them itself."""
    column, files = image_files(table, option, column)
    paths = []
    for file in blocks(files, column):
        if file is None or file["bytes"] is not None or not file["path"]:
            return None
        paths.append(Path(file["path"]))
    return paths


def blocks(files: "HubDataset", column: str) -> Iterator[dict[str, Any] | None]:
    """The files of a column, row by row."""
    return (file for block in files.iter(batch_size=1000) for file in block[column])


def unread_images(source: str, read: list[Path], option: str) -> list[str]:
    """A sentence on what lies in a local folder of image files and is not among those that were read."""
    found = find_images(source, option)
    known = {os.path.realpath(path) for path in read}
    left = [path for path in found.files if os.path.realpath(path) not in known]
    if left:
        found.notes.append(
            f"{option}={source}: {counted(len(left), 'image{s}')} in neither split, so not read ({printable(left[0])})."
        )
    return found.notes

"""Weights of others: which files of a folder are read, what they hold by their headers, and what tells them apart.

Nothing but safetensors is ever opened. Imports nothing heavy.
"""

import hashlib
import logging
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from unlearn_runner.errors import ConfigurationError, existing_folder, folder_or_name

NETWORKS = (  # of a pipeline; one alone lies at the top
    *(".", "unet", "transformer", "vae"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
STEMS = ("diffusion_pytorch_model", "model")
CONFIGS = (".json", ".txt")
LORA = "pytorch_lora_weights.safetensors"  # as diffusers writes it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILE = re.compile(  # <stem>[.<variant>][-<shard>-of-<shards>][.<variant>].safetensors
    r"(?P<stem>diffusion_pytorch_model|model)(?P<a>\.\w+)??(-(?P<shard>\d+)-of-(?P<shards>\d+))?(?P<b>\.\w+)??\.safetensors"
)


class Stored(NamedTuple):
    """One tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: F32, F16, BF16, ...


def weights_identity(source: str | Path) -> str:
    """What tells weights apart: equal for the same bytes wherever they lie, and another where a file was replaced.

    Of a folder a digest of the config files and weight files that are read, of a file one of its bytes. Of a hub id
    that id, with the commit of the snapshot in the hub's cache if there is one (so ask when the model was built); of
    any other name, "auto" for one, that name.
    """
    place = model_in(Path(source).expanduser())
    if place.is_file():
        return f"sha256:{_digest_of_file(place)}"
    if not place.is_dir():
        commit = _cached_commit(str(source))
        return str(source) if commit is None else f"{source}@{commit}"
    digest = hashlib.sha256()
    for part in PARTS:
        folder = place / part
        if folder.is_dir():
            configs = (file for file in folder.iterdir() if file.suffix in CONFIGS and file.is_file())
            additions = [file] if (file := folder / LORA).is_file() else []
            for file in sorted({*configs, *additions, *_chosen(folder)}):
                if not file.name.startswith("."):
                    digest.update(f"{file.relative_to(place)} {_digest_of_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def located(source: str, option: str) -> Path | str:
    """The folder of weights that `source` is, of a run its model/, or else its name on the hub.

    Raises ConfigurationError, naming the option to change, if it is neither.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir()) or "://" in source:
        raise ConfigurationError(
            f"{option}={source}: expected a folder as diffusers' save_pretrained writes it, or a hub id, got a single "
            "file or a link; if it is a whole pipeline, write it as a folder once, with diffusers' "
            "StableDiffusionPipeline.from_single_file(<file>, config=<folder of a pipeline like it>)"
            ".save_pretrained(<folder>)."
        )
    found = folder_or_name(source, option)
    return found if isinstance(found, str) else existing_folder(str(model_in(found)), option)


def file_or_located(source: str, option: str) -> Path | str:
    """The same, or a file of weights, which may be a part of a model's."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".safetensors", *PICKLES) and not path.is_dir():
        raise ConfigurationError(f"{option}={source}: there is no such file.")
    return located(source, option)


def model_in(folder: Path) -> Path:
    """The folder of weights in a run's folder; any other folder is one itself."""
    return folder / "model" if (folder / "summary.json").is_file() else folder


def fetched(source: Path | str, weights: bool) -> Path:
    """The folder with a model's config files and, if asked for, its weights: `source`, or that of the hub's cache, into
    which they are fetched first.

    Raises whatever the hub's client does.
    """
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the caller's sentence says it once
    wanted = [f"*{suffix}" for suffix in CONFIGS]
    if weights:
        plain = (".safetensors", "-?????-of-?????.safetensors")
        wanted += [f"{_prefix(part)}{stem}{end}" for part in NETWORKS for stem in STEMS for end in plain]
    folder = Path(snapshot_download(source, allow_patterns=wanted))
    lacking = [part for part in NETWORKS if (folder / part / "config.json").is_file() and not _variants(folder / part)]
    if weights and lacking:  # it has variants alone
        wanted = [f"{_prefix(part)}{stem}*.safetensors" for part in lacking for stem in STEMS]
        snapshot_download(source, allow_patterns=wanted)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a network's folder: one file or all its shards; a variant (fp16) where there is nothing else.

    Raises ConfigurationError if there are none, not all, or more than one choice.
    """
    variants = _variants(folder)
    if not variants:
        others = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
        found = f"only {others[0]}, a pickle, which can run code and is not read" if others else "none"
        raise ConfigurationError(
            f"there must be weights as safetensors in {folder}, found {found}; save the model again with "
            "save_pretrained(<folder>, safe_serialization=True)."
        )
    files = _chosen(folder)
    if not files:
        raise ConfigurationError(
            f"{folder} holds weights in several variants ({', '.join(sorted(variants))}) and no plain ones; "
            "keep one variant."
        )
    shards = FILE.fullmatch(files[0].name)["shards"]
    if shards is not None and len(files) != int(shards):
        raise ConfigurationError(
            f"{folder} holds {len(files)} of the {int(shards)} files that its weights are split into; fetch them again."
        )
    return files


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What a network's folder holds, by name, read from the files' headers alone.

    Raises ConfigurationError, naming the file, if one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    part = tensors.get_slice(name)
                    found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(
                f"{file} is no whole safetensors file ({error}); fetch or save it again."
            ) from error
    return found


def _prefix(part: str) -> str:
    return "" if part == "." else f"{part}/"


def _variants(folder: Path) -> dict[str, list[Path]]:
    """Files of weights by variant, "" being the plain one."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*.safetensors")):
        if (parts := FILE.fullmatch(file.name)) and file.is_file():
            found[(parts["a"] or parts["b"] or "").removeprefix(".")].append(file)
    return dict(found)


def require_finite_weights(source: str | Path, option: str) -> None:
    """Raise ConfigurationError, naming the option, if a weight in a folder is no finite number. Reads one at a time."""
    import torch
    from safetensors import safe_open

    place = model_in(Path(source).expanduser())
    for folder in (place / part for part in NETWORKS if (place / part).is_dir()):
        for file in _chosen(folder):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    tensor = weights.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise ConfigurationError(
                            f"{option}={source}: the weight {name} in {file.relative_to(place)} has values that are "
                            "not finite, so nothing can be measured; give another model."
                        )


def _chosen(folder: Path) -> list[Path]:
    """The plain ones, else the only variant; nothing if there are several."""
    variants = _variants(folder)
    files = variants.get("") or (next(iter(variants.values())) if len(variants) == 1 else [])
    whole = [file for file in files if FILE.fullmatch(file.name)["shards"] is None]
    return whole[:1] or files


def _cached_commit(name: str) -> str | None:
    """Of a model's newest snapshot in the hub's cache; None if it was never fetched, or is no hub id."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
    return ref.read_text().strip() if ref.is_file() else None


def _digest_of_file(path: Path) -> str:
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Once for each state of a file: a network's weights are gigabytes."""
    from unlearn_runner.schema import file_digest

    return file_digest(path)

"""A part of a model, as other tools leave it: one network's folder, a file with some weights, or LoRA's additions.

What is not there stays the base's. A name that the base does not have is refused.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.loading import (
    BESIDE,
    DTYPES,
    FORMER_KINDS,
    check_architecture,
    check_weights,
    load_weights,
    reading,
    spellings,
)
from unlearn_runner.weights import LORA, PICKLES, file_or_located

EXPECTED = (
    "a model of the base's architecture, or a part of one: a network's folder, a .safetensors, .pt or .bin file of "
    "weights under diffusers' names, or LoRA"
)
LORA_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")  # kohya's, PEFT's, diffusers' former name
LORA_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
WRAPPERS = ("module.", "_orig_mod.")  # before names, of torch's DataParallel and compile
INSIDE = ("state_dict", "model", "unet", "weights")  # of a file whose one entry is the weights
ORIGINAL = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")  # Stable Diffusion's first code


class Patch(NamedTuple):
    """What is to be put in the place of a part of the base."""

    summary: str  # of which networks how many tensors
    apply: Callable[[], None]


def patch_of(model: Any, source: str, option: str) -> Patch | None:
    """The part of the model that `source` holds; None if it is not a part: then it is a whole one, or nothing.

    Raises ConfigurationError, naming the option to change, if it is a part of another model.
    """
    if not isinstance(model, Diffusion):
        return None
    place = Path(file_or_located(source, option))
    with reading(option, source, EXPECTED):
        if place.is_file():
            return _of_file(model, place)
        if not place.is_dir():
            return None
        if (place / "model_index.json").is_file() or (place / "scheduler_config.json").is_file():
            return None  # a pipeline, or a pixel model whose files lie side by side
        networks = {name: network for name, network in model.networks.items() if (place / name).is_dir()}
        if (place / LORA).is_file():
            if networks:
                raise ConfigurationError(f"it holds {LORA} and {'/, '.join(networks)}/: give the one that counts alone")
            return _of_file(model, place / LORA)
        whole = networks.keys() == model.networks.keys() and (place / "scheduler").is_dir()
        networks = networks or _named_by_config(model, place)
        files = sorted(place.glob("*.safetensors"))
        if not networks and files and not (place / "config.json").is_file():
            raise ConfigurationError(f"it is a folder with files of weights; give one of them, as {files[0]}")
        return None if whole or not networks else _of_folder(networks, place)


def _named_by_config(model: Diffusion, place: Path) -> dict[str, nn.Module]:
    """The network that lies in a folder of its own, by what its config says that it is."""
    file = place / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    names = {name: type(network).__name__ for name, network in model.networks.items()}
    found = [name for name, own in names.items() if kind is not None and kind in (own, FORMER_KINDS.get(own))]
    if len(found) > 1:
        raise ConfigurationError(f"it may be {' or '.join(found)}: lay it in a folder of that name, and give the outer")
    return {name: model.networks[name] for name in found}


def _of_folder(networks: Mapping[str, nn.Module], place: Path) -> Patch:
    check_architecture(networks, place)
    check_weights(networks, place)
    summary = ", ".join(f"all tensors of {name}" for name in networks)
    return Patch(summary, lambda: load_weights(networks, place))


def _of_file(model: Diffusion, file: Path) -> Patch:
    tensors = _read(file)
    if not tensors:
        raise ConfigurationError("it holds no tensor")
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigurationError(f"it holds values in {name} that are not finite numbers")
    if any(name.endswith(LORA_DOWN) for name in tensors):
        return _of_lora(model, tensors)
    if any(name.startswith(ORIGINAL) for name in tensors):
        raise ConfigurationError(
            "it has the names of Stable Diffusion's original code; write it as a folder once, with diffusers' "
            "StableDiffusionPipeline.from_single_file(<file>, config=<folder of the base>).save_pretrained(<folder>)"
        )
    places = _places(model)
    found, unknown = {}, []
    for name in tensors:
        place = places.get(_unwrapped(name))
        if place is not None:
            found[name] = place
        elif not name.endswith(BESIDE):
            unknown.append(name)
    if unknown or not found:
        first = (
            f"it holds {unknown[0]}, which is no weight of the base" if unknown else "it holds no weight of the base"
        )
        raise ConfigurationError(f"{first} ({len(unknown)} of its {len(tensors)} tensors are not)")
    base = {part: network.state_dict() for part, network in model.networks.items()}
    for name, (part, own) in found.items():
        shape, wanted = tuple(tensors[name].shape), tuple(base[part][own].shape)
        if shape != wanted:
            raise ConfigurationError(f"it holds {name} in the shape {shape}, and the base has it in {wanted}")
        if not tensors[name].is_floating_point():
            raise ConfigurationError(f"it holds {name} as {tensors[name].dtype}; {', '.join(DTYPES)} are read")
    times = Counter(found.values())
    if twice := [name for name, place in found.items() if times[place] > 1]:
        raise ConfigurationError(f"it holds one weight under several names ({', '.join(twice[:2])})")
    counts = Counter(part for part, _ in found.values())

    def apply() -> None:
        own = {part: network.state_dict() for part, network in model.networks.items()}
        read = _read(file)
        with torch.no_grad():
            for name, (part, weight) in found.items():
                own[part][weight].copy_(read[name])

    return Patch(_counted(model, counts), apply)


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises what safetensors and torch raise for what is damaged, or holds more than tensors."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix not in PICKLES:
        raise ConfigurationError(f"the name of a file of weights ends in .safetensors or one of {', '.join(PICKLES)}")
    if not file.stat().st_size:
        raise ConfigurationError("it is empty")
    found = torch.load(file, map_location="cpu", weights_only=True)
    while isinstance(found, Mapping):  # steps and losses may stand beside the weights, other weights may not
        inner = {name: part for name, part in found.items() if isinstance(part, Mapping) and part}
        inner = {name: part for name, part in inner.items() if all(isinstance(own, Tensor) for own in part.values())}
        if len(inner) > 1:
            raise ConfigurationError(f"it holds several sets of weights ({', '.join(map(str, inner))}); save one alone")
        if not inner or not set(inner) <= set(INSIDE):
            break
        (found,) = inner.values()
    if not isinstance(found, Mapping) or not all(isinstance(part, Tensor) for part in found.values()):
        raise ConfigurationError("it holds something else than tensors by name")
    return dict(found)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _own_names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Of each tensor that is not LoRA's the name in the network, and the name without LoRA."""
    for own in network.state_dict():
        if ".lora_" not in own:
            yield own, own.replace(".base_layer", "")


def _places(model: Diffusion) -> dict[str, tuple[str, str]]:
    """The network and its own name of each tensor, by every name that it may be stored under; with the network's name
    before it always, without where that is clear.
    """
    found: dict[str, tuple[str, str] | None] = {}
    for part, network in model.networks.items():
        for own, plain in _own_names(network):
            for spelt in spellings(plain):
                found[f"{part}.{spelt}"] = (part, own)
                found[spelt] = (part, own) if found.get(spelt, (part, own))[0] == part else None
    return {name: place for name, place in found.items() if place is not None}


def _of_lora(model: Diffusion, tensors: dict[str, Tensor]) -> Patch:
    """By diffusers' own loaders, on copies: what they make of the weights is what is taken over."""
    layers = sum(name.endswith(LORA_DOWN) for name in tensors)
    if layers != sum(name.endswith(LORA_UP) for name in tensors):
        raise ConfigurationError("half of an addition is missing: each layer has a matrix down and one up")

    def fused() -> dict[str, nn.Module]:
        pipeline = model.pipeline(copy.deepcopy)
        with _silent("diffusers"), suppress(ValueError, RuntimeError, KeyError):  # what fits is counted below
            pipeline.load_lora_weights(dict(tensors))
        networks = {name: getattr(pipeline, name) for name in model.networks}
        added = sum(hasattr(part, "lora_A") for network in networks.values() for part in network.modules())
        if added != layers:
            raise ConfigurationError(f"it adds to {layers} layers, {added} of which fit the base")
        pipeline.fuse_lora(components=[name for name in pipeline._lora_loadable_modules if name in networks])
        pipeline.unload_lora_weights()
        return networks

    fused()

    def apply() -> None:
        for name, network in fused().items():
            theirs, own = network.state_dict(), model.networks[name].state_dict()
            with torch.no_grad():
                for ours, plain in _own_names(model.networks[name]):
                    own[ours].copy_(theirs[plain])

    return Patch(f"LoRA's additions to {layers} layers", apply)


@contextmanager
def _silent(library: str) -> Iterator[None]:
    """Without what a library logs in here; what is wrong is said in one sentence."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _counted(model: Diffusion, counts: Counter[str]) -> str:
    sizes = {part: sum(1 for _ in _own_names(network)) for part, network in model.networks.items()}
    return ", ".join(f"{counts[part]} of the {size} tensors of {part}" for part, size in sizes.items() if counts[part])

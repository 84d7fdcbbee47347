"""The parts that a latent model's pipeline folder describes, as diffusers' `save_pretrained` writes it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.loading import (
    check_weights,
    json_in,
    network_in,
    reading,
    reading_part,
    require_kind,
    scheduler_in,
    without_weights,
)
from unlearn_runner.models.texts import keep_libraries_quiet, require_vocabulary, tokenizer_in, tokenizer_of
from unlearn_runner.weights import fetched, located

MODELS = {  # what to take for a pipeline
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "dit",
}


class PipelineKind(NamedTuple):
    """A class of diffusers' pipelines, and the classes of its parts besides autoencoder and scheduler."""

    name: str
    part: str  # the network's folder
    network: str
    encoders: Mapping[str, str] = MappingProxyType({})  # of texts
    tokenizers: Mapping[str, str] = MappingProxyType({})
    optional: tuple[str, ...] = ()  # text encoders that may be left out
    flows: bool = False


class Described(NamedTuple):
    """What a folder describes; networks with zeros for weights."""

    index: dict[str, Any]
    network: nn.Module
    vae: Any
    encoders: dict[str, nn.Module]  # those that there are
    tokenizers: dict[str, Any]
    scheduler: Any


def described(
    weights: str, kind: PipelineKind, require: Callable[[Described], None], without: tuple[str, ...] = ()
) -> Described:
    """The parts that the folder or hub id of a pipeline of this kind describes, but for the text encoders `without`.

    Raises ConfigurationError, naming the part, if one cannot be had, and what `require` raises if they do not fit each
    other.
    """
    source = located(weights, "model.weights")
    import diffusers
    import transformers

    def text_encoder(name: str) -> nn.Module:
        json_in(folder / name / "config.json")
        cls = getattr(transformers, kind.encoders[name])
        config = cls.config_class
        if config.__name__ == "CLIPConfig":
            config = transformers.CLIPTextConfig
        return without_weights(lambda: cls(config.from_pretrained(folder / name)))

    keep_libraries_quiet()
    folders = (kind.part, "vae", *kind.encoders, *kind.tokenizers, "scheduler")
    expected = (
        f"a folder with a {kind.name} of diffusers ({', '.join(f'{name}/' for name in folders)}), or a hub id that can "
        "be reached, or download it elsewhere and give the folder"
    )
    with reading("model.weights", weights, expected):
        folder = fetched(source, weights=False)
    with reading("model.weights", weights, expected), reading_part("model_index.json"):
        index = _require_pipeline(folder, kind)
    there = [name for name in kind.encoders if name not in without and not _left_out(index, kind, name)]
    found: dict[str, Any] = {}
    for name, make in (
        (kind.part, partial(network_in, getattr(diffusers, kind.network), folder / kind.part)),
        ("vae", partial(network_in, diffusers.AutoencoderKL, folder / "vae")),
        *((name, partial(text_encoder, name)) for name in there),
        *((name, partial(tokenizer_in, folder, name, kind.tokenizers[name])) for name in map(tokenizer_of, there)),
        ("scheduler", partial(scheduler_in, folder, kind.flows)),
    ):
        with reading("model.weights", weights, expected), reading_part(name):
            found[name] = make()
    tokenizers = {tokenizer_of(name): found[tokenizer_of(name)] for name in there}
    encoders = {name: found[name] for name in there}
    parts = Described(index, found[kind.part], found["vae"], encoders, tokenizers, found["scheduler"])
    with reading("model.weights", weights, "parts that fit each other"):
        for tokenizer, encoder in zip(tokenizers.values(), encoders.values(), strict=True):
            require_vocabulary(tokenizer, encoder)
        require(parts)
    with reading("model.weights", weights, expected):
        if isinstance(source, Path):
            check_weights({kind.part: parts.network, "vae": parts.vae, **encoders}, folder)
    return parts


def _left_out(index: dict[str, Any], kind: PipelineKind, encoder: str) -> bool:
    return encoder in kind.optional and (index.get(encoder) or [None, None])[-1] is None


def _require_pipeline(folder: Path, kind: PipelineKind) -> dict[str, Any]:
    """What a folder's index says, if it is that of a pipeline of this kind."""
    index = json_in(folder / "model_index.json")
    name = index.get("_class_name")
    if name != kind.name:
        instead = next((f"; take model={model}" for pipeline, model in MODELS.items() if pipeline == name), "")
        raise ConfigurationError(f"it is a {name}{instead}")
    expected = {kind.part: kind.network, "vae": "AutoencoderKL", **kind.encoders, **kind.tokenizers}
    for part, cls in expected.items():
        found = (index.get(part) or [None])[-1]
        require_kind(folder / part, found and found.removesuffix("Fast"), cls)
    return index

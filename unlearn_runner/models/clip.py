"""CLIP models of open_clip: how well pictures fit texts (2103.00020)."""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, final

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import digest, fingerprint
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.options import Depth, ImageSize, Seed, Width
from unlearn_runner.rules import model_options

WEIGHTS = "clip.safetensors"


@final
class Clip(nn.Module):
    """Image tower, text tower and temperature of an open_clip model, in evaluation mode, its weights fixed.

    Embeddings are of length 1. `name` is that of the weights, and `activation` that of the towers where the weights are
    another's; for the provenance.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, name: str, activation: str | None = None):
        super().__init__()
        import open_clip

        self.network = network.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.activation = activation
        size = network.visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = (
            getattr(network.visual, key, None) or default
            for key, default in (
                ("image_mean", open_clip.OPENAI_DATASET_MEAN),
                ("image_std", open_clip.OPENAI_DATASET_STD),
            )
        )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def visual(self) -> nn.Module:
        return self.network.visual

    @property
    def provenance(self) -> dict[str, str]:
        return {"clip": self.name} | ({} if self.activation is None else {"clip_activation": self.activation})

    @property
    def num_features(self) -> int:
        return self.network.visual.output_dim

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature: what cosines are multiplied by before a softmax over texts."""
        return self.network.logit_scale.exp()

    def pixels(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [-1, 1] as the image tower wants them."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        return (images / 2 + 0.5 - self.mean) / self.std

    def of_images(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return F.normalize(self.network.visual(self.pixels(images)), dim=1)

    def of_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        self._say_what_is_cut(texts)
        tokens = self.tokenizer(list(texts)).to(self.mean.device)
        return F.normalize(self.network.encode_text(tokens), dim=1)

    def _say_what_is_cut(self, texts: Sequence[str]) -> None:
        length, encode = self.tokenizer.context_length, getattr(self.tokenizer, "encode", None)
        cut = [text for text in texts if encode is not None and len(encode(text)) + 2 > length]  # with start and end
        if cut:
            logging.getLogger(__name__).warning(
                f"CLIP reads only the first {length} tokens of a text; these are longer: {', '.join(map(repr, cut))}"
            )

    def of_uint8(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """As `of_images`, of images in bytes."""
        return self.of_images(images.float() / 127.5 - 1)

    def fingerprint(self) -> str:
        """A hash of all that its embeddings depend on, but for rounding."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        length = getattr(self.tokenizer, "context_length", None)
        return fingerprint([self.name, digest(tensors), str(self.network), type(self.tokenizer).__name__, length])

    def save(self, folder: Path) -> None:
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}  # a GPU's may not be
        save_file(weights, Path(folder) / WEIGHTS)

    def load(self, folder: Path) -> None:
        self.network.load_state_dict(load_file(Path(folder) / WEIGHTS))


def small_clip(
    seed: Seed,
    image_size: ImageSize = 16,
    patch_size: Annotated[int, Gt(0), Le(1024)] = 4,
    width: Width = 64,
    layers: Depth = 3,
    heads: Width = 4,
    text_width: Width = 64,
    text_layers: Depth = 2,
    embed_dim: Width = 64,
    context_length: Annotated[int, Ge(3), Le(1024)] = 16,
) -> Clip:
    """open_clip's CLIP at a size that trains on a CPU, with its tokenizer and fresh weights drawn from `seed`."""
    model_options.heads_of_clip(width, text_width, heads)
    model_options.patches_of_clip(image_size, patch_size)
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
        network = open_clip.CLIP(
            embed_dim,
            open_clip.CLIPVisionCfg(
                layers=layers, width=width, head_width=width // heads, patch_size=patch_size, image_size=image_size
            ),
            open_clip.CLIPTextCfg(context_length=context_length, width=text_width, heads=heads, layers=text_layers),
        )
    return Clip(network, open_clip.SimpleTokenizer(context_length=context_length), "small_clip")


def pretrained_clip(model: str, pretrained: str, seed: int = 0) -> Clip:
    """One of open_clip's models by its name, with the weights of a tag of open_clip's or of a file.

    Raises ConfigurationError, saying what to give, if they cannot be had. `seed` is without effect.
    """
    return named_clip(model, pretrained, "clip.network.model", "clip.network.pretrained")


def named_clip(model: str, pretrained: str, model_option: str, weights_option: str) -> Clip:
    """The same, naming other options in what it raises."""
    network = open_clip_network(model, pretrained, model_option, weights_option)
    import open_clip

    name = f"open_clip {model} {Path(pretrained).name}"
    return Clip(network, open_clip.get_tokenizer(model), name, activation_of(network))


def open_clip_network(model: str, pretrained: str, model_option: str, weights_option: str) -> nn.Module:
    """An open_clip model of this name with the weights of a tag or of a file, with the activation they learnt with.

    Raises ConfigurationError, naming the options to change, if they cannot be had, if a file holds more than weights,
    or if what is known of them says that they learnt with QuickGELU, as OpenAI's did, and the model has GELU.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise ConfigurationError(
            f"{model_option}={model}: open_clip has no such model; take ViT-B-32, or another of its list_models()."
        )
    path = Path(pretrained).expanduser()
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        quick = bool(tag.get("quick_gelu", False)) or None  # a tag that says nothing has the model's own
    else:
        quick = _learnt_with_quick_gelu(path, _plain_weights(path, weights_option), model) if path.is_file() else None
    has_quick = bool(open_clip.get_model_config(model).get("quick_gelu", False))
    if quick is not None and quick != has_quick:
        other = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
        activations = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        raise ConfigurationError(
            f"{model_option}={model}: the weights '{pretrained}' learnt with {activations[0]}, and this model has "
            f"{activations[1]}; take {model_option}={other}."
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; ours is the one sentence below
    try:
        return open_clip.create_model(
            model, pretrained=pretrained if tag else str(path), require_pretrained=True, weights_only=True
        )
    except Exception as error:  # what open_clip, the hub's client and torch raise, for one mistake
        known = [name_tag for name, name_tag in open_clip.list_pretrained() if name == model]
        raise ConfigurationError(
            f"{model} needs the weights '{pretrained}', which could not be had ({first_line(error)}); put them into a "
            f"file and give {weights_option}=<file>" + (f", or take one of {', '.join(known)}." if known else ".")
        ) from error


def activation_of(network: nn.Module) -> str:
    """Of an open_clip model's transformers, for the provenance."""
    from open_clip.transformer import QuickGELU

    return "QuickGELU" if any(isinstance(module, QuickGELU) for module in network.modules()) else "GELU"


def _plain_weights(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a file, which open_clip reads again: one that holds anything else never reaches it.

    Raises ConfigurationError; what torch advises, to trust the file, is not passed on.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other formats, which end in the error below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a wrong file makes them raise
        raise ConfigurationError(
            f"{option}={path}: expected safetensors, or a state dict saved by torch, got a damaged file or one with "
            "objects in it, which could run code and are not read; give the weights as safetensors."
        ) from error
    return weights.get("state_dict", weights) if isinstance(weights, dict) else {}


def _learnt_with_quick_gelu(path: Path, weights: dict[str, Tensor], model: str) -> bool | None:
    """What a file's weights, the open_clip_config.json beside it, or its name tell of their activation; None: nothing.

    The hub's folders have the config; OpenAI's own files have entries of their own; others are mostly named by a tag.
    """
    import open_clip

    config = path.parent / "open_clip_config.json"
    if config.is_file():
        return bool(json.loads(config.read_text()).get("model_cfg", {}).get("quick_gelu", False))
    if {"input_resolution", "context_length", "vocab_size"} <= weights.keys():
        return True
    named = f"{path.parent.name}/{path.name}".lower().replace("-", "_")
    tags = [tag for tag in open_clip.list_pretrained_tags_by_model(model) if tag in named]
    if not tags:
        return None
    return any(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False) for tag in tags)

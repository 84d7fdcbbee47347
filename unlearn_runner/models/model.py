"""The face that a generative model shows to methods and evaluation, whatever it is made of."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlearn_runner.cache import digest, fingerprint
from unlearn_runner.distributed import in_shares
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.models.path import Path as ProbabilityPath
from unlearn_runner.types import Passes

NO_RESULT = ("training", "network_evaluations", "passes", "tuning", "seed")  # attributes of models that change none
BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version")  # of configurations of libraries


class Noising(NamedTuple):
    """q(m|x0) = N(scale * center, std^2), independent over m's entries: where noisy samples m of an image come from.

    A diffusion model's m is x_t, with scale gamma_t, center x0 and std sigma_t; a VAE's is the latent z, with the
    encoder's mean and standard deviation.
    """

    scale: Float[Tensor, "b ..."] | float  # broadcast over the entries of m, as std may be
    center: Float[Tensor, "b ..."]
    std: Float[Tensor, "b ..."]

    def sample(self, eps: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The m that standard normal `eps` makes."""
        return self.scale * self.center + self.std * eps


class Condition(NamedTuple):
    """What a backbone receives besides x_t and t: rows of tensors, one for each sample; None where it reads none.

    Text-to-image models that receive more than one text encoder's states have more fields here.
    """

    label: Int64[Tensor, "b"] | None = None
    tokens: Float[Tensor, "b s d"] | None = None  # text encoders' hidden states
    pooled: Float[Tensor, "b e"] | None = None  # one vector of the whole text (SDXL)
    sizes: Float[Tensor, "b 6"] | None = None  # original, corner of the crop, drawn; height first (SDXL)
    guidance: Float[Tensor, "b"] | None = None  # the scale that a network distilled with guidance receives (FLUX)

    def and_then(self, other: "Condition") -> "Condition":
        """These rows, and the other's after them."""
        pairs = zip(self, other, strict=True)
        return Condition(*(None if first is None else torch.cat([first, second]) for first, second in pairs))


class GenerativeModel(nn.Module, ABC):
    """A model of images that learns to explain noisy samples m ~ q(m|x0) of them.

    Conditions are class labels [b], prompt embeddings [b s d], or None.
    """

    image_shape: tuple[int, int, int]
    sample_shape: tuple[int, ...]  # of one image's m
    prediction_shape: tuple[int, int, int]  # of what `predict` returns for it
    num_labels: int | None
    num_train_timesteps: int  # noise levels; 1: the model knows one only, and its timestep is 0
    prompts: tuple[str, ...] | None = None  # the texts of its labels, if it can `embed` any text as a condition
    guidance_scale: float = 1.0  # of sampling; 1: none
    has_likelihood = True  # of images: `loss` bounds -log p(x0), and metrics of likelihood can ask for it
    is_diffusion = False  # its noisy samples lie on a `path`: see DiffusionModel
    has_training_loss = True  # `loss` is one to learn images by, or to tell by which it has learnt
    num_features: int | None = None  # of an image, if it has `features`
    network_evaluations: int  # samples passed forward through the trained network so far
    passes: Passes = Passes()

    @property
    def num_entries(self) -> int:
        """How many numbers `loss` sums over: pixels, or entries of a latent."""
        return math.prod(self.prediction_shape)

    def fingerprint(self) -> str:
        """A hash of all that its samples and losses depend on, but for rounding: its weights and their precision, and
        every setting of it and of its parts, such as the noise schedule, what is predicted, clipping, scaling factors,
        guidance, the tokenizer, and prompts. What is kept of a model is kept under this.
        """
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        settings = {name: described(part) for name, part in _parts(self).items() if name not in NO_RESULT}
        return fingerprint(
            {
                "kind": type(self).__name__,
                "weights": digest(tensors),
                "precision": str(self.passes.precision),
                "settings": settings,
            }
        )

    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """What can stand for images wherever this face takes them, and costs nothing more then: of a latent model their
        latents; here, the images.
        """
        return x0

    def features(self, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b ..."] | None) -> Float[Tensor, "b d"]:
        """What the network makes of clean images, without noise and without a gradient; if it has `num_features`."""
        raise TypeError(f"a {type(self).__name__} has no features of images")

    @abstractmethod
    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        """q(m|x0) at these timesteps."""

    @abstractmethod
    def predict(
        self,
        m: Float[Tensor, "b ..."],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The network's prediction at m. A timestep may lie between two of the schedule."""

    @abstractmethod
    def loss(
        self,
        prediction: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b ..."],
        eps: Float[Tensor, "b ..."],
        std: Float[Tensor, "b ..."],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """The loss of the prediction at m if m is a sample of x0, made by eps at standard deviation std: a sum.

        `prediction` is that of `predict`. Any image may be asked about: SISS asks two about one m.
        """

    @abstractmethod
    def sample(
        self,
        n: int,
        cond: Shaped[Tensor, "{n} ..."] | None,
        generator: torch.Generator,
        num_inference_steps: int,
        sampler: str = "ddim",
        batch_size: int = 256,
    ) -> Float[Tensor, "{n} c h w"]:
        """n images in [-1, 1]. Equal generator states and batch sizes give two models the same noise."""

    @abstractmethod
    def freeze_for_unlearning(self) -> None:
        """Take from training what q(m|x0) is made of, which unlearning must not move."""

    def thaw(self) -> None:
        """Let training move all that learning from images can."""
        self.requires_grad_(True)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that diffusers' `from_pretrained` loads."""

    @abstractmethod
    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        """The folder of `source`, a folder written by `save` or a hub id, if `load` can read it; by headers alone.

        Raises ConfigurationError, naming the option to change, if there is none or it holds another architecture.
        """

    @abstractmethod
    def load(self, source: str | Path, option: str = "model.weights") -> None:
        """Take over the weights, and the noise schedule with what the network predicts, of what `fits`."""


class DiffusionModel(GenerativeModel):
    """Its noisy sample is x_t = scale_t x0 + std_t eps on its `path`, which also says what the network predicts.

    x0 is what the network denoises: pixels, or latents.
    """

    is_diffusion = True
    path: ProbabilityPath

    @abstractmethod
    def guided(
        self,
        x_t: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | Condition | None,
    ) -> Float[Tensor, "b c h w"]:
        """The prediction that sampling goes by: `predict`'s, with classifier-free guidance where the model has it."""

    @abstractmethod
    def picture(self, x0: Float[Tensor, "b ..."]) -> Float[Tensor, "b c h w"]:
        """The image in [-1, 1] that a denoised x0 stands for."""

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The parts of a pipeline of diffusers that draws with this network, by their names there."""


def loss_at(
    model: GenerativeModel,
    noising: Noising,
    x0: Float[Tensor, "b ..."],
    cond: Shaped[Tensor, "b ..."] | None,
    timesteps: Int64[Tensor, "b"],
    eps: Float[Tensor, "b ..."],
) -> Float[Tensor, "b"]:
    """`denoising_loss` where x0's noising is known."""
    m = noising.sample(eps)
    return model.loss(model.predict(m, timesteps, cond), x0, m, eps, noising.std, timesteps)


def denoising_loss(
    model: GenerativeModel,
    x0: Float[Tensor, "b ..."],
    cond: Shaped[Tensor, "b ..."] | None,
    timesteps: Int64[Tensor, "b"],
    eps: Float[Tensor, "b ..."],
) -> Float[Tensor, "b"]:
    """L_simple of each image (DDPM, 2006.11239, equation 14): the squared error of what the network predicts at the x_t
    made of x0 and eps, summed over pixels, or over a latent's entries.

    For a VAE, whose noisy sample is the latent z: minus the evidence lower bound at one z, log q(z|x0) - log p(z) -
    log p(x0|z), in nats.
    """
    return loss_at(model, model.noising(x0, timesteps, cond), x0, cond, timesteps, eps)


def squared_error(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """||prediction - target||^2 of each sample: a sum over its pixels."""
    return (prediction - target).square().flatten(1).sum(1)


def predict_eps(
    model: DiffusionModel,
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."] | None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """eps_pred for the x_t made of x0 and eps, and that x_t; of a latent model x0 may be the image."""
    x_t = model.noising(x0, timesteps, cond).sample(eps)
    return model.path.noise_of(model.predict(x_t, timesteps, cond), x_t, timesteps), x_t


def predict_x0(
    model: DiffusionModel,
    x_t: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."] | None,
    guided: bool = False,
) -> Float[Tensor, "b c h w"]:
    """The network's guess of x0, whatever its parametrisation; `guided`: the one that sampling goes by."""
    prediction = (model.guided if guided else model.predict)(x_t, timesteps, cond)
    return model.path.x0_of(prediction, x_t, timesteps)


def pipeline_name(source: str | Path) -> str | None:
    """The pipeline that a folder in diffusers' layout says it is; None where it says nothing, or is no folder."""
    index = Path(source) / "model_index.json"
    return json.loads(index.read_text()).get("_class_name") if index.is_file() else None


def labels_in_words(num_labels: int | None) -> str:
    """For messages: "10 labels", "no labels"."""
    return "no labels" if num_labels is None else f"{num_labels} labels"


def first_noises(
    model: GenerativeModel,
    n: int,
    cond: Shaped[Tensor, "{n} ..."] | None,
    generator: torch.Generator,
    batch_size: int,
) -> Iterator[tuple[Float[Tensor, "b ..."], Shaped[Tensor, "b ..."] | None]]:
    """Standard normal m for n samples, batch by batch as they are asked for, and their conditions."""
    for start in range(0, n, batch_size):
        count = min(batch_size, n - start)
        noise = torch.randn((count, *model.sample_shape), generator=generator, device=generator.device)
        yield noise, None if cond is None else cond[start : start + count]


def passed(model: GenerativeModel, network: Callable[..., Any], *rows: Tensor | None) -> Any:
    """`network(*rows)` for a part of the model whose output for a row depends on that row alone.

    In shares, if there are several processes, and as the model's `passes` say.
    """
    precision, parts, graphs = model.passes

    def compute(*rows: Tensor | None) -> Any:
        if precision is None:
            return network(*rows)
        with torch.autocast(next(part for part in rows if part is not None).device.type, precision):
            found = network(*rows)
        return tuple(part.float() for part in found) if isinstance(found, tuple) else found.float()

    def in_parts(*rows: Tensor | None) -> Any:
        if parts == 1 or not torch.is_grad_enabled():
            return compute(*rows) if graphs is None else graphs(model, network, compute, rows)
        total = next(len(part) for part in rows if part is not None)
        size = -(-total // parts)
        found = [
            checkpoint(
                compute,
                *(None if part is None else part[start : start + size] for part in rows),
                use_reentrant=False,
            )
            for start in range(0, total, size)
        ]
        if isinstance(found[0], tuple):
            return tuple(torch.cat(part) for part in zip(*found, strict=True))
        return torch.cat(found)

    return in_shares(in_parts, *rows)


def described(part: Any) -> Any:
    """What a part of a model does, apart from its weights, as JSON: its kind, configuration, vocabulary, settings."""
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, Mapping):
        return {
            str(key): described(value)
            for key, value in part.items()
            if not str(key).startswith("_") and key not in BOOKKEEPING
        }
    if isinstance(part, Sequence):
        return [described(value) for value in part]
    if isinstance(part, Tensor | np.ndarray):
        return part.tolist()
    if isinstance(part, set | frozenset | torch.dtype):
        return sorted(map(str, part)) if isinstance(part, set | frozenset) else str(part)
    if isinstance(part, GenerativeModel):
        return part.fingerprint()
    found = {"kind": type(part).__name__}
    if hasattr(part, "get_vocab"):  # a tokenizer; how it pads and cuts is what it was last called with
        pieces = json.loads(part.backend_tokenizer.to_str()) if hasattr(part, "backend_tokenizer") else {}
        state = {key: value for key, value in pieces.items() if key not in ("padding", "truncation")}
        special = {key: str(token) for key, token in part.special_tokens_map.items()}
        return found | {"vocabulary": part.get_vocab(), "length": part.model_max_length, **special, "state": state}
    config = getattr(part, "config", None)
    if config is not None:
        return found | {"config": described(config.to_dict() if hasattr(config, "to_dict") else config)}
    if isinstance(part, nn.Module) and type(part).__module__.startswith("unlearn_runner."):
        return found | {name: described(value) for name, value in _parts(part).items() if name not in NO_RESULT}
    if isinstance(part, nn.Module):
        return found | {"layers": str(part)}
    plain = (bool, int, float, str, tuple, type(None))
    return found | {name: described(value) for name, value in _parts(part).items() if isinstance(value, plain)}


def _parts(whole: Any) -> dict[str, Any]:
    """Attributes by name, and of a module its modules; in alphabetical order."""
    found = dict(getattr(whole, "__dict__", {})) | dict(getattr(whole, "_modules", {}))
    return {name: found[name] for name in sorted(found) if not name.startswith("_")}


def require_finite(network: nn.Module, name: str) -> None:
    """Raise NonFiniteError, which calls the network `name`, if a weight is not a finite number."""
    weights = {key: weight for key, weight in network.state_dict().items() if weight.is_floating_point()}
    bad = {key: count for key, weight in weights.items() if (count := int((~weight.isfinite()).sum()))}
    if bad:
        total = sum(weight.numel() for weight in weights.values())
        first = next(iter(bad))
        for wrapper in ("backbone.", "texts.", "codec."):  # what is left is its name in the model's folder
            first = first.removeprefix(wrapper)
        raise NonFiniteError(
            f"{name} has weights that are not finite numbers, {sum(bad.values())} of {total}, the first in {first}"
        )


def require_usable(model: GenerativeModel, name: str, option: str) -> None:
    """Raise ConfigurationError if a weight of the model, which `option` (model.weights=...) gives, is not finite."""
    try:
        require_finite(model, name)
    except NonFiniteError as error:
        raise ConfigurationError(f"{option}: {error}; give others, or have them trained anew.") from error


def clipped(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images cut to [-1, 1]. What is infinite becomes NaN, or it would be taken for black or white."""
    return torch.where(images.isinf(), torch.nan, images.clamp(-1, 1))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout in here, and back as it was afterwards."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)

"""A diffusion or flow model, made of parts: a path, a backbone that predicts on it, and a codec.

`build_ddpm` and `build_stable_diffusion` put parts together; a model of another kind is a backbone or a codec more.
"""

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.loading import BASES_ARCHITECTURE, fitting, load_weights, reading, reading_part, scheduler_in
from unlearn_runner.models.model import (
    Condition,
    DiffusionModel,
    Noising,
    clipped,
    evaluating,
    first_noises,
    passed,
    squared_error,
)
from unlearn_runner.models.path import path_of
from unlearn_runner.models.sampling import denoise, sampler_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from unlearn_runner.models.texts import Word

FEATURES_LEVEL = 0.1  # t / T at which an image's features are read: low noise tells most of content (2112.03126, 3.2)


class Part(nn.Module, ABC):
    """What backbone and codec have in common: networks of diffusers' pipelines, and what lies beside them."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """By their names in a pipeline's folder."""

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """What a pipeline gets of this part, by its names there."""

    def require(self, folder: Path) -> None:
        """Raise ConfigurationError if what a folder holds beside the networks does not fit them."""

    def take(self, folder: Path) -> None:
        """Take over what a folder holds beside the networks' weights, which are there already."""


class Codec(Part):
    """From images to what the network denoises, and back."""

    image_shape: tuple[int, int, int]
    exact: bool  # nothing is lost: a likelihood of what is denoised is one of images

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, int, int]: ...

    @abstractmethod
    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l i j"]:
        """What stands for images; that itself is left as it is."""

    @abstractmethod
    def picture(self, x0: Float[Tensor, "b l i j"]) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1]."""


@final
class Pixels(Codec):
    """The images themselves."""

    exact = True
    networks: dict[str, nn.Module] = {}  # noqa: RUF012
    components: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, image_shape: tuple[int, int, int]):
        super().__init__()
        self.image_shape = image_shape

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x0

    def picture(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return clipped(x0)


class Backbone(Part):
    """The network that predicts on the path, and what makes its conditions."""

    num_labels: int | None
    prompts: tuple[str, ...] | None = None
    flows: bool  # whether it is known on flows, too

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What predicts: its trained part."""

    @abstractmethod
    def conditions(self, cond: Shaped[Tensor, "b ..."] | None) -> Condition:
        """Of class labels or prompts by their number, of embeddings, or of none."""

    @abstractmethod
    def empty(self, count: int) -> Condition | None:
        """The condition that guidance leads away from; None: there is no guidance."""

    @abstractmethod
    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]: ...

    def embed(self, prompts: "Sequence[str]") -> Float[Tensor, "n s d"]:
        """Conditions for any texts, if it has `prompts`."""
        raise TypeError("it draws under class labels, not under texts")

    def embeddings(self, cond: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b s d"]:
        """Of prompts by their number, -1 being what guidance leads away from, or of embeddings; if it has `prompts`."""
        raise TypeError("it draws under class labels, not under texts")

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        """Of each text encoder, the row of the hidden states that holds a text's last token, and where the encoder's
        rows end; if it has `prompts`.
        """
        raise TypeError("it draws under class labels, not under texts")

    def words(self) -> "list[Word]":
        """Texts that are read as one token at the beginning of a prompt; if it has `prompts`."""
        raise TypeError("it draws under class labels, not under texts")

    def slopes(self, text: str, count: int, cost: "Callable[[Tensor], Tensor]") -> Float[Tensor, "{count} v"]:
        """By how much, to first order, a cost of a text's embedding changes when each of its first `count` tokens is
        exchanged for each of the vocabulary; if it has `prompts`.
        """
        raise TypeError("it draws under class labels, not under texts")

    def text_projections(self) -> list[nn.Module]:
        """The linear layers that read tokens, each with a `weight` [o, d]: of keys and of values."""
        return []

    def places(self, shape: tuple[int, ...]) -> int | None:
        """In how many places the network sees samples of this shape; None of one that sees them at several sizes."""
        return None

    @property
    def middle(self) -> nn.Module | None:
        """The block [b d i j] between the way down and the way up, if it has one."""
        return getattr(self.network, "mid_block", None)

    @property
    def num_features(self) -> int | None:
        """The middle block's channels."""
        return None if self.middle is None else self.network.config.block_out_channels[-1]

    @abstractmethod
    def freeze_for_unlearning(self) -> None:
        """Take from training what unlearning shall not move."""

    def pipeline(self, components: dict[str, Any]) -> "DiffusionPipeline":
        """diffusers' pipeline of these parts.

        Raises ConfigurationError if there is none that takes LoRA.
        """
        raise ConfigurationError("LoRA is read for text-to-image models only")

    @abstractmethod
    def save(self, components: dict[str, Any], folder: Path) -> None:
        """Write a folder that diffusers' pipeline of this backbone loads."""


@final
class Diffusion(DiffusionModel):
    """Denoising diffusion or a flow, over pixels or latents (2006.11239, 2112.10752, 2210.02747).

    Batches hold what the network denoises; only `encode` and `picture` cross between images and that. `guided` predicts
    uncond + guidance_scale (cond - uncond) (2207.12598).
    """

    def __init__(self, backbone: Backbone, codec: Codec, scheduler: "SchedulerMixin", guidance_scale: float = 1.0):
        super().__init__()
        self.codec, self.backbone = codec, backbone
        self.guidance_scale = guidance_scale
        self.has_likelihood = codec.exact
        self.network_evaluations = 0  # samples passed forward through the backbone so far
        self._take_schedule(scheduler)

    def _take_schedule(self, scheduler: "SchedulerMixin") -> None:
        device = next(self.backbone.network.parameters()).device
        self.path = path_of(scheduler, self.backbone.places(self.sample_shape)).to(device)
        self.scheduler = scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> "Diffusion":
        """With an own backbone; networks beside it that are not trained are shared, for an autoencoder is 0.3 GB."""
        for part in self.networks.values():
            if part is not self.backbone.network and not any(weight.requires_grad for weight in part.parameters()):
                memo[id(part)] = part
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.codec.image_shape

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.codec.sample_shape

    @property
    def prediction_shape(self) -> tuple[int, int, int]:
        return self.codec.sample_shape

    @property
    def num_labels(self) -> int | None:
        return self.backbone.num_labels

    @property
    def prompts(self) -> tuple[str, ...] | None:
        return self.backbone.prompts

    @property
    def num_train_timesteps(self) -> int:
        return self.path.num_train_timesteps

    def embed(self, prompts: "Sequence[str]") -> Float[Tensor, "n s d"]:
        """Conditions for any texts, if it has `prompts`."""
        return self.backbone.embed(prompts)

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        """Of each text encoder, the row of `token_states` that holds a text's last token, and where the encoder's rows
        end; if it has `prompts`.
        """
        return self.backbone.last_tokens(text)

    def words(self) -> "list[Word]":
        """Texts that are read as one token at the beginning of a prompt; if it has `prompts`."""
        return self.backbone.words()

    def slopes(self, text: str, count: int, cost: "Callable[[Tensor], Tensor]") -> Float[Tensor, "{count} v"]:
        """By how much, to first order, a cost of a text's embedding [1, s, d] changes when each of its first `count`
        tokens is exchanged for each of the vocabulary; if it has `prompts`.
        """
        return self.backbone.slopes(text, count, cost)

    def text_projections(self) -> list[nn.Module]:
        """The linear layers that read tokens, each with a `weight` [o, d]: of keys and of values."""
        return self.backbone.text_projections()

    def embeddings(self, cond: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b s d"]:
        """Of prompts by their number, -1 being the empty one, or of embeddings; if it has `prompts`."""
        return self.backbone.embeddings(cond)

    def token_states(self, prompts: "Sequence[str]") -> Float[Tensor, "n s d"]:
        """The text encoders' hidden states of any texts, which `text_projections` read; if it has `prompts`."""
        return self.backbone.conditions(self.embed(prompts)).tokens

    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l i j"]:
        return self.codec.encode(x0)

    def picture(self, x0: Float[Tensor, "b l i j"]) -> Float[Tensor, "b c h w"]:
        return self.codec.picture(x0)

    @property
    def num_features(self) -> int | None:
        return self.backbone.num_features

    @torch.no_grad()
    def features(self, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b ..."] | None) -> Float[Tensor, "b d"]:
        """The mean over space of the middle block's output at t = FEATURES_LEVEL T, for x0 without noise."""
        x0 = self.encode(x0)
        timesteps = torch.full((len(x0),), int(FEATURES_LEVEL * self.num_train_timesteps), device=x0.device)
        found: list[Tensor] = []
        block = self.backbone.middle
        hook = block.register_forward_hook(lambda _, __, output: found.append(output.detach()))
        try:
            self.network_evaluations += len(x0)
            scale, _ = self.path.amplitudes(timesteps)
            self._answer(scale * x0, timesteps, *self.backbone.conditions(cond))
        finally:
            hook.remove()
        return found[0].float().flatten(2).mean(2)

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        scale, std = self.path.amplitudes(timesteps)
        return Noising(scale, self.encode(x0), std)

    def predict(
        self,
        m: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | Condition | None,
    ) -> Float[Tensor, "b c h w"]:
        self.network_evaluations += len(m)
        rows = cond if isinstance(cond, Condition) else self.backbone.conditions(cond)
        return passed(self, self._answer, m, timesteps, *rows)

    def _answer(self, m: Tensor, timesteps: Tensor, *rows: Tensor | None) -> Tensor:
        return self.backbone(m, self.path.schedule.network_time(timesteps), Condition(*rows))

    def guided(
        self,
        x_t: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | Condition | None,
    ) -> Float[Tensor, "b c h w"]:
        empty = None if self.guidance_scale == 1 else self.backbone.empty(len(x_t))
        if empty is None:
            return self.predict(x_t, timesteps, cond)
        wanted = cond if isinstance(cond, Condition) else self.backbone.conditions(cond)
        both = self.predict(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), empty.and_then(wanted))
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def loss(
        self,
        prediction: Float[Tensor, "b l i j"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b l i j"],
        eps: Float[Tensor, "b l i j"],
        std: Float[Tensor, "b 1 1 1"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """The squared error of what the network predicts, summed over pixels or a latent's entries."""
        if not self.path.wants_the_image:
            return squared_error(prediction, eps)  # which costs no pass through an encoder
        return squared_error(prediction, self.path.wanted(self.encode(x0), eps, timesteps))

    def thaw(self) -> None:
        """The backbone's network: images reach a codec only without a gradient, and prompts say what they said."""
        self.backbone.network.requires_grad_(True)

    def freeze_for_unlearning(self) -> None:
        """All but what the backbone leaves to unlearning; the noise of a diffusion model is not learnt."""
        self.backbone.freeze_for_unlearning()

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        cond: Shaped[Tensor, "{n} ..."] | None,
        generator: torch.Generator,
        num_inference_steps: int,
        sampler: str = "ddim",
        batch_size: int = 256,
    ) -> Float[Tensor, "{n} c h w"]:
        """With guidance. The samplers "ddim" and "ddim_clipped" are deterministic given the first noise; "ddpm" is
        ancestral, and on pixels the same as diffusers' DDPMPipeline with this generator (on a CPU up to rounding). On a
        flow they are those of `PathSampler`. Noise is drawn batch by batch.
        """
        # latents do not lie in [-1, 1]: no guess of x0 is cut
        uncut = {} if self.codec.exact else {"clip_sample": False, "thresholding": False}
        scheduler = sampler_of(self.path, self.scheduler.config, sampler, num_inference_steps, **uncut)
        images = []
        with evaluating(self):
            for x, part in first_noises(self, n, cond, generator, batch_size):
                condition = self.backbone.conditions(part)
                images.append(self.picture(denoise(self, scheduler, x, condition, generator)))
        return torch.cat(images).contiguous()  # some convolutions return channels_last

    @property
    def components(self) -> dict[str, Any]:
        return {**self.codec.components, **self.backbone.components, "scheduler": self.scheduler}

    def save(self, folder: Path) -> None:
        self.backbone.save(self.components, folder)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By their names in a pipeline's folder."""
        return {**self.codec.networks, **self.backbone.networks}

    def pipeline(self, made_of: "Callable[[nn.Module], nn.Module]") -> "DiffusionPipeline":
        """diffusers' pipeline of what `made_of` makes of each network, and of the other parts as they are."""
        parts = {name: made_of(part) if isinstance(part, nn.Module) else part for name, part in self.components.items()}
        return self.backbone.pipeline(parts)

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        with reading(option, source, BASES_ARCHITECTURE):
            folder = fitting(self.networks, source, option)
            with reading_part("scheduler"):
                path_of(scheduler_in(folder, self.backbone.flows), self.backbone.places(self.sample_shape))
            for part in (self.codec, self.backbone):
                part.require(folder)
        return folder

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        folder = self.fits(source, option)
        load_weights(self.networks, folder)
        for part in (self.codec, self.backbone):
            part.take(folder)
        self._take_schedule(scheduler_in(folder, self.backbone.flows))

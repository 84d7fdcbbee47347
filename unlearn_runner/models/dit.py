"""DiT (2212.09748): class-conditional diffusion of latents by a transformer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Backbone, Diffusion
from unlearn_runner.models.latents import Latents, pixels_a_side, require_autoencoder
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import path_of
from unlearn_runner.models.pipelines import Described, PipelineKind, described
from unlearn_runner.options import GuidanceScale
from unlearn_runner.rules import model_options

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

KIND = PipelineKind(name="DiTPipeline", part="transformer", network="DiTTransformer2DModel")


@final
class ClassTransformer(Backbone):
    """DiTTransformer2DModel. Conditions are class indices [b]; the index after the last class is no class, which
    guidance leads away from.

    Where it learnt the variance of its steps, too, the half of its prediction that tells it is left out: losses do not
    reach it, and no sampler here asks for it.
    """

    flows = False

    def __init__(
        self, transformer: "DiTTransformer2DModel", names: Sequence[str] = (), gradient_checkpointing: bool = False
    ):
        super().__init__()
        self.transformer = transformer
        self.names, self.gradient_checkpointing = tuple(names), gradient_checkpointing
        self.train()

    def train(self, mode: bool = True) -> "ClassTransformer":
        """Labels are never dropped: each block would drop others, by draws of torch's own generator."""
        super().train(mode)
        for module in self.transformer.modules():
            if hasattr(module, "token_drop"):
                module.eval()
        return self

    @property
    def network(self) -> "DiTTransformer2DModel":
        return self.transformer

    @property
    def num_labels(self) -> int:
        return self.transformer.config.num_embeds_ada_norm

    def conditions(self, cond: Int64[Tensor, "b"]) -> Condition:
        return Condition(label=cond)

    def empty(self, count: int) -> Condition:
        return Condition(label=torch.full((count,), self.num_labels, device=self.transformer.device))

    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        return self.transformer(x_t, time, condition.label, return_dict=False)[0][:, : x_t.shape[1]]

    def freeze_for_unlearning(self) -> None:
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def save(self, components: dict[str, Any], folder: Path) -> None:
        from diffusers import DiTPipeline

        pipeline = DiTPipeline(**components)
        if self.names:
            pipeline.register_to_config(id2label={str(label): name for label, name in enumerate(self.names)})
        pipeline.save_pretrained(folder, safe_serialization=True)


def dit(
    transformer: "DiTTransformer2DModel",
    vae: "AutoencoderKL",
    scheduler: "SchedulerMixin",
    names: Sequence[str] = (),
    guidance_scale: float = 4.0,
    gradient_checkpointing: bool = False,
) -> Diffusion:
    """Of the parts of its pipeline; `names` of its classes."""
    side = transformer.config.sample_size * pixels_a_side(vae)
    backbone = ClassTransformer(transformer, names, gradient_checkpointing)
    return Diffusion(backbone, Latents(vae, (vae.config.in_channels, side, side)), scheduler, guidance_scale)


def build_dit(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    gradient_checkpointing: bool = True,
    guidance_scale: GuidanceScale = 4.0,
) -> Diffusion:
    """DiT under the classes `label_names`.

    `weights` is a folder or hub id of a DiTPipeline, which decides architecture, schedule and size; it is checked here
    and its weights are read later, by `load`. All of the transformer is trained; the autoencoder stays as it is.
    """
    model_options.classes_for_dit(label_names is not None)
    found = described(weights, KIND, _require_fitting)
    model = dit(found.network, found.vae, found.scheduler, label_names, guidance_scale, gradient_checkpointing)
    if model.image_shape != tuple(image_shape) or model.num_labels != len(label_names):
        raise ConfigurationError(
            f"model.weights={weights} makes images of {model.image_shape} with {model.num_labels} classes, the dataset "
            f"has {tuple(image_shape)} with {len(label_names)}; choose weights and a dataset that fit each other."
        )
    return model


def _require_fitting(parts: Described) -> None:
    """Raise ConfigurationError unless the transformer denoises the autoencoder's latents."""
    config, channels = parts.network.config, parts.vae.config.latent_channels
    if config.in_channels != channels or (config.out_channels or channels) not in (channels, 2 * channels):
        out = config.out_channels or config.in_channels
        raise ConfigurationError(
            f"its transformer turns {config.in_channels} channels into {out}; noisy samples have {channels}, and as "
            "many, or twice as many with the steps' variance, are to come out."
        )
    require_autoencoder(parts.vae)
    path_of(parts.scheduler)

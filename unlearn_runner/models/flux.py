"""FLUX.1: a flow of latents by a transformer that reads two text encoders and a guidance scale."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, final

from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.latents import require_autoencoder
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import path_of
from unlearn_runner.models.pipelines import Described, PipelineKind, described
from unlearn_runner.models.prompted import Parts, Tuning
from unlearn_runner.models.stable_diffusion import fitting_dataset
from unlearn_runner.models.texts import Texts, last_of_t5, with_pooled
from unlearn_runner.options import FrozenType, NonNegativeFloat, Trainable, Width
from unlearn_runner.rules import model_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KIND = PipelineKind(
    name="FluxPipeline",
    part="transformer",
    network="FluxTransformer2DModel",
    encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5Tokenizer"},
    flows=True,
)


@final
class ClipAndT5(Texts):
    """T5's last hidden states as tokens, CLIP's pooled output, and the guidance scale, None for a network that takes
    none (schnell).
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        guidance: float | None = 3.5,
        t5_tokens: int = 512,
    ):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = encoders
        self.tokenizer, self.tokenizer_2 = tokenizers
        self.guidance, self.t5_tokens = guidance, t5_tokens

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        clip, t5 = (part.to(self.text_encoder.device) for part in self.ids(prompts))
        return with_pooled(self.text_encoder_2(t5)[0], self.text_encoder(clip).pooler_output)

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        return [last_of_t5(self.spellings()[1], text)]

    def empty(self) -> Float[Tensor, "1 s d"]:
        return self.embed([""])

    def condition(self, packed: Float[Tensor, "b s d"]) -> Condition:
        pooled = packed[:, -1, : self.text_encoder.config.hidden_size]
        guidance = None if self.guidance is None else packed.new_full((len(packed),), self.guidance)
        return Condition(tokens=packed[:, :-1], pooled=pooled, guidance=guidance)

    @property
    def encoders(self) -> dict[str, tuple[Any, nn.Module]]:
        return {
            "text_encoder": (self.tokenizer, self.text_encoder),
            "text_encoder_2": (self.tokenizer_2, self.text_encoder_2),
        }

    def pipeline(self) -> type["DiffusionPipeline"]:
        from diffusers import FluxPipeline

        return FluxPipeline

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {}


def build_flux(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Trainable = "lora",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = True,
    frozen_dtype: FrozenType = "float32",
    texts_on_cpu: bool = False,
    embedded_guidance: NonNegativeFloat = 3.5,
    t5_tokens: Annotated[int, Ge(1), Le(512)] = 512,
) -> Diffusion:
    """FLUX.1 (dev or schnell) that draws under the prompts `label_names`.

    `weights` is a folder or hub id of a FluxPipeline, which decides architecture and path; it is checked here and its
    weights are read later, by `load`. `embedded_guidance` is what the network receives wherever it is asked, in losses
    and in drawing: it predicts as if it was guided, and there is no other guidance. `t5_tokens`: of a prompt (schnell's
    own: 256).
    """
    model_options.prompts_for_texts(bool(label_names))
    found = described(weights, KIND, _require_fitting)
    guidance = float(embedded_guidance) if found.network.config.guidance_embeds else None
    texts = ClipAndT5(list(found.tokenizers.values()), list(found.encoders.values()), guidance, t5_tokens)
    parts = Parts(found.vae, texts, found.network, found.scheduler)
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing, frozen_dtype, texts_on_cpu)
    return fitting_dataset(parts, weights, image_shape, label_names, 1.0, tuning, seed)


def _require_fitting(parts: Described) -> None:
    """Raise ConfigurationError unless each part's width is that of what it is handed."""
    config, channels = parts.network.config, 4 * parts.vae.config.latent_channels
    if config.in_channels != channels or config.out_channels not in (None, channels) or config.patch_size != 1:
        raise ConfigurationError(
            f"its transformer turns {config.in_channels} channels into {config.out_channels or config.in_channels}, "
            f"two by two places of the noisy samples have {channels}."
        )
    clip, t5 = (encoder.config for encoder in parts.encoders.values())
    wanted = (config.pooled_projection_dim, config.joint_attention_dim)
    if (clip.hidden_size, t5.d_model) != wanted:
        raise ConfigurationError(
            f"its transformer reads a pooled text of {wanted[0]} numbers and tokens of {wanted[1]}, its text encoders "
            f"make them of {clip.hidden_size} and {t5.d_model}."
        )
    if clip.hidden_size > t5.d_model:
        raise ConfigurationError("its pooled text is wider than its tokens, which is not read here.")
    require_autoencoder(parts.vae)
    path_of(parts.scheduler, places=1)

"""Stable Diffusion 3 and 3.5 (2403.03206): a flow of latents by a transformer that reads three text encoders."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, final

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.latents import build_autoencoder, pixels_a_side, require_autoencoder
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import path_of
from unlearn_runner.models.pipelines import Described, PipelineKind, described
from unlearn_runner.models.prompted import Parts, Tuning
from unlearn_runner.models.stable_diffusion import fitting_dataset
from unlearn_runner.models.texts import (
    Texts,
    build_text_encoder,
    build_tokenizer,
    last_of_clip,
    last_of_t5,
    with_pooled,
)
from unlearn_runner.options import AutoencoderOptions, Depth, FrozenType, GuidanceScale, NumTokens, Trainable, Width
from unlearn_runner.rules import model_options

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

KIND = PipelineKind(
    name="StableDiffusion3Pipeline",
    part="transformer",
    network="SD3Transformer2DModel",
    encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5Tokenizer"},
    optional=("text_encoder_3",),
    flows=True,
)


@final
class ClipPairAndT5(Texts):
    """The last hidden states but one of two CLIP text encoders side by side, filled up with zeros to `width`; after
    these tokens those of T5, or zeros without it; and both CLIPs' pooled projections side by side.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], width: int, t5_tokens: int = 256):
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = [*encoders, None][:3]
        self.tokenizer, self.tokenizer_2, self.tokenizer_3 = [*tokenizers, None][:3]
        self.width, self.t5_tokens = width, t5_tokens

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        ids = [part.to(self.text_encoder.device) for part in self.ids(prompts)]
        found = [
            encoder(part, output_hidden_states=True)
            for encoder, part in zip((self.text_encoder, self.text_encoder_2), ids, strict=False)
        ]
        clip = torch.cat([part.hidden_states[-2] for part in found], 2)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[2]))
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), self.t5_tokens, self.width)
        else:
            t5 = self.text_encoder_3(ids[2])[0]
        return with_pooled(torch.cat([clip, t5], 1), torch.cat([part.text_embeds for part in found], 1))

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        """In CLIP's rows, whose two encoders' states lie side by side, and in T5's after them."""
        clip = last_of_clip(self.spellings()[0], text)
        if self.text_encoder_3 is None:
            return [clip]
        first, end = last_of_t5(self.spellings()[2], text)
        return [clip, (clip[1] + first, clip[1] + end)]

    def empty(self) -> Float[Tensor, "1 s d"]:
        return self.embed([""])

    def condition(self, packed: Float[Tensor, "b s d"]) -> Condition:
        pooled = sum(encoder.config.projection_dim for encoder in (self.text_encoder, self.text_encoder_2))
        return Condition(tokens=packed[:, :-1], pooled=packed[:, -1, :pooled])

    @property
    def encoders(self) -> dict[str, tuple[Any, nn.Module]]:
        found = {
            "text_encoder": (self.tokenizer, self.text_encoder),
            "text_encoder_2": (self.tokenizer_2, self.text_encoder_2),
            "text_encoder_3": (self.tokenizer_3, self.text_encoder_3),
        }
        return {name: pair for name, pair in found.items() if pair[1] is not None}

    def pipeline(self) -> type["DiffusionPipeline"]:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {} if self.text_encoder_3 is not None else {"text_encoder_3": None, "tokenizer_3": None}


def build_sd3(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Trainable = "lora",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = True,
    frozen_dtype: FrozenType = "float32",
    texts_on_cpu: bool = False,
    guidance_scale: GuidanceScale = 7.0,
    t5: bool = True,
    t5_tokens: Annotated[int, Ge(0), Le(512)] = 256,
    shift: Annotated[float, Ge(0.01), Le(100)] = 1.0,
    layers: Depth = 4,
    heads: Depth = 4,
    attention_head_dim: Width = 24,
    patch_size: Annotated[int, Ge(1), Le(16)] = 2,
    vae: AutoencoderOptions | None = None,
    text_width: Width = 48,
    text_layers: Depth = 2,
    num_tokens: NumTokens = 24,
    words: Sequence[str] = (),
) -> Diffusion:
    """Stable Diffusion 3 or 3.5 that draws under the prompts `label_names`.

    Where `weights` is not "auto" but a folder or hub id of a StableDiffusion3Pipeline, that decides architecture and
    path, and all arguments from `shift` on are without effect; it is checked here and its weights are read later, by
    `load`. Without `t5`, the largest of its text encoders (9 GB in 16 bits), it draws as the pipeline does without it:
    zeros stand for `t5_tokens` tokens, its `max_sequence_length`.

    With "auto" a small one without T5 is built with fresh weights drawn from `seed`; `vae` are arguments of its
    AutoencoderKL, which is drawn first, so that they alone decide its weights. Its two text encoders are alike, each
    `text_width` wide, and know `words` as one token each. `shift` is alpha of 2403.03206, section 5.3.2.
    """
    model_options.prompts_for_texts(bool(label_names))
    model_options.t5_of_fresh(weights, t5)
    model_options.width_of_transformer(weights, heads, attention_head_dim)
    model_options.heads_of_texts(weights, text_width)
    model_options.channels_of_autoencoder(weights, vae)
    if weights == "auto":
        from diffusers import FlowMatchEulerDiscreteScheduler

        tokenizers = [build_tokenizer(words, num_tokens) for _ in range(2)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
            autoencoder = build_autoencoder(image_shape, vae, shift=0.0)  # the pipeline asks for a number
            encoders = [build_text_encoder(part, text_width, text_layers, projected=True) for part in tokenizers]
            network = _fresh_transformer(autoencoder, text_width, layers, heads, attention_head_dim, patch_size)
        texts = ClipPairAndT5(tokenizers, encoders, network.config.joint_attention_dim, t5_tokens)
        parts = Parts(autoencoder, texts, network, FlowMatchEulerDiscreteScheduler(shift=shift))
    else:
        found = described(weights, KIND, _require_fitting, () if t5 else ("text_encoder_3",))
        texts = ClipPairAndT5(
            list(found.tokenizers.values()),
            list(found.encoders.values()),
            found.network.config.joint_attention_dim,
            t5_tokens,
        )
        parts = Parts(found.vae, texts, found.network, found.scheduler)
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing, frozen_dtype, texts_on_cpu)
    model = fitting_dataset(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)
    most = parts.network.config.pos_embed_max_size * parts.network.config.patch_size
    if max(model.sample_shape[1:]) > most:
        raise ConfigurationError(
            f"model.weights={weights} knows places of latents of up to {most} x {most}, and the dataset's images make "
            f"{model.sample_shape[1]} x {model.sample_shape[2]}; choose a smaller dataset.image_size."
        )
    return model


def _fresh_transformer(
    autoencoder: "AutoencoderKL",
    text_width: int,
    layers: int,
    heads: int,
    attention_head_dim: int,
    patch_size: int,
) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    side = autoencoder.config.sample_size // pixels_a_side(autoencoder)
    return SD3Transformer2DModel(
        sample_size=side,
        patch_size=patch_size,
        in_channels=autoencoder.config.latent_channels,
        out_channels=autoencoder.config.latent_channels,
        num_layers=layers,
        attention_head_dim=attention_head_dim,
        num_attention_heads=heads,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=heads * attention_head_dim,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=max(1, side // patch_size),
        qk_norm="rms_norm",
    )


def _require_fitting(parts: Described) -> None:
    """Raise ConfigurationError unless each part's width is that of what it is handed."""
    config, channels = parts.network.config, parts.vae.config.latent_channels
    if not config.in_channels == config.out_channels == channels:
        raise ConfigurationError(
            f"its transformer turns {config.in_channels} channels into {config.out_channels}, the noisy samples have "
            f"{channels}."
        )
    clips = [encoder.config for encoder in list(parts.encoders.values())[:2]]
    pooled = sum(clip.projection_dim for clip in clips)
    if pooled != config.pooled_projection_dim:
        raise ConfigurationError(
            f"its transformer reads a pooled text of {config.pooled_projection_dim} numbers, its text encoders make it "
            f"of {pooled}."
        )
    widths = [sum(clip.hidden_size for clip in clips), pooled]
    t5 = [encoder.config.d_model for encoder in list(parts.encoders.values())[2:]]
    if max(widths) > config.joint_attention_dim or t5 not in ([], [config.joint_attention_dim]):
        raise ConfigurationError(
            f"its transformer reads conditions of {config.joint_attention_dim} numbers, its text encoders make them of "
            f"{', '.join(map(str, [*widths[:1], *t5]))}."
        )
    require_autoencoder(parts.vae)
    path_of(parts.scheduler, places=1)

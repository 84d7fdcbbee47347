"""Stable Diffusion 1.x, 2.x and XL: models of diffusers' UNet2DConditionModel."""

from collections.abc import Sequence
from typing import Literal

import torch

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.latents import build_autoencoder, pixels_a_side, require_autoencoder
from unlearn_runner.models.loading import require_channels
from unlearn_runner.models.path import path_of
from unlearn_runner.models.pipelines import Described, PipelineKind, described
from unlearn_runner.models.prompted import KINDS, Parts, Tuning, text_to_image
from unlearn_runner.models.texts import ClipPair, ClipTexts, build_text_encoder, build_tokenizer
from unlearn_runner.options import (
    AutoencoderOptions,
    Channels,
    Depth,
    FrozenType,
    GuidanceScale,
    NumTokens,
    OpenUnitInterval,
    PredictionType,
    Trainable,
    Width,
)
from unlearn_runner.rules import model_options

PLAIN = PipelineKind(
    name="StableDiffusionPipeline",
    part="unet",
    network="UNet2DConditionModel",
    encoders={"text_encoder": "CLIPTextModel"},
    tokenizers={"tokenizer": "CLIPTokenizer"},
)
XL = PipelineKind(
    name="StableDiffusionXLPipeline",
    part="unet",
    network="UNet2DConditionModel",
    encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"},
)


def build_stable_diffusion(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Trainable = "full",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = False,
    frozen_dtype: FrozenType = "float32",
    texts_on_cpu: bool = False,
    guidance_scale: GuidanceScale = 7.5,
    prediction_type: PredictionType = "epsilon",
    block_out_channels: Channels = (32, 64),
    layers_per_block: Depth = 1,
    attention_heads: Width = 4,
    norm_num_groups: Width = 8,
    vae: AutoencoderOptions | None = None,
    text_width: Width = 64,
    text_layers: Depth = 2,
    num_tokens: NumTokens = 24,
    words: Sequence[str] = (),
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear",
    beta_start: OpenUnitInterval = 0.00085,
    beta_end: OpenUnitInterval = 0.012,
) -> Diffusion:
    """Stable Diffusion that draws under the prompts `label_names`.

    Where `weights` is not "auto" but a folder or hub id of a StableDiffusionPipeline, that decides the architecture and
    the schedule, and all arguments from `prediction_type` on are without effect; it is checked here and its weights are
    read later, by `load`. With "auto" a small one is built with fresh weights drawn from `seed`; `vae` are arguments of
    its AutoencoderKL, which is drawn first, so that they alone decide its weights; `words` are those that its tokenizer
    knows as one token each.
    """
    model_options.prompts_for_texts(bool(label_names))
    model_options.flow_of_pixels(weights, prediction_type)
    model_options.groups_of_channels(weights, block_out_channels, norm_num_groups)
    model_options.heads_of_latents(weights, block_out_channels, attention_heads)
    model_options.heads_of_texts(weights, text_width)
    model_options.channels_of_autoencoder(weights, vae)
    model_options.range_of_betas(weights, beta_start, beta_end, beta_schedule)
    if weights == "auto":
        from diffusers import DDIMScheduler, UNet2DConditionModel

        tokenizer = build_tokenizer(words, num_tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
            autoencoder = build_autoencoder(image_shape, vae)
            parts = Parts(
                vae=autoencoder,
                texts=ClipTexts(tokenizer, build_text_encoder(tokenizer, text_width, text_layers)),
                network=UNet2DConditionModel(
                    sample_size=image_shape[1] // pixels_a_side(autoencoder),
                    in_channels=autoencoder.config.latent_channels,
                    out_channels=autoencoder.config.latent_channels,
                    block_out_channels=tuple(block_out_channels),
                    down_block_types=("CrossAttnDownBlock2D",) * len(block_out_channels),
                    up_block_types=("CrossAttnUpBlock2D",) * len(block_out_channels),
                    layers_per_block=layers_per_block,
                    cross_attention_dim=text_width,
                    attention_head_dim=attention_heads,
                    norm_num_groups=norm_num_groups,
                ),
                scheduler=DDIMScheduler(
                    num_train_timesteps=1000,
                    beta_schedule=beta_schedule,
                    beta_start=beta_start,
                    beta_end=beta_end,
                    prediction_type=prediction_type,
                    clip_sample=False,
                    set_alpha_to_one=False,
                    timestep_spacing="trailing",
                    steps_offset=1,  # without effect here; the pipeline warns of another value
                ),
            )
    else:
        parts = _parts_of(weights, PLAIN, tuple(image_shape))
        model_options.prediction_of_weights(weights, prediction_type, parts.scheduler.config.prediction_type)
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing, frozen_dtype, texts_on_cpu)
    return fitting_dataset(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)


def build_sdxl(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Trainable = "lora",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = True,
    frozen_dtype: FrozenType = "float32",
    texts_on_cpu: bool = False,
    guidance_scale: GuidanceScale = 5.0,
) -> Diffusion:
    """SDXL that draws under the prompts `label_names`, its base model alone; the refiner is not needed.

    `weights` is a folder or hub id of a StableDiffusionXLPipeline, which decides architecture and schedule; it is
    checked here and its weights are read later, by `load`.
    """
    model_options.prompts_for_texts(bool(label_names))
    parts = _parts_of(weights, XL, tuple(image_shape))
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing, frozen_dtype, texts_on_cpu)
    return fitting_dataset(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)


def fitting_dataset(
    parts: Parts,
    weights: str,
    image_shape: Sequence[int],
    label_names: Sequence[str],
    guidance_scale: float,
    tuning: Tuning,
    seed: int,
) -> Diffusion:
    """The model of these parts, if they fit the dataset's images and prompts."""
    patch = KINDS[type(parts.network).__name__].patch(parts.network)
    sides = pixels_a_side(parts.vae) * (patch or 2 ** (len(parts.network.config.block_out_channels) - 1))
    model_options.sides_of_latents(*image_shape[1:], sides)
    if parts.vae.config.in_channels != image_shape[0]:
        raise ConfigurationError(
            f"model.weights={weights} draws images of {parts.vae.config.in_channels} channels, the dataset has "
            f"{image_shape[0]}; choose weights and a dataset that fit each other."
        )
    model = text_to_image(parts, tuple(image_shape), tuple(label_names), guidance_scale, tuning, seed)
    model.backbone.texts.tokens(model.prompts)  # says what is not read of them
    return model


def _parts_of(weights: str, kind: PipelineKind, image_shape: tuple[int, int, int]) -> Parts:
    """Of a pipeline's folder or hub id. Raises ConfigurationError if they do not fit each other."""
    found = described(weights, kind, _require_fitting)
    pairs = [part for pair in zip(found.tokenizers.values(), found.encoders.values(), strict=True) for part in pair]
    if kind is PLAIN:
        texts = ClipTexts(*pairs)
    else:
        zeros = bool(found.index.get("force_zeros_for_empty_prompt", True))
        texts = ClipPair(*pairs, size=image_shape[1:], zeros_for_empty=zeros)
    return Parts(found.vae, texts, found.network, found.scheduler)


def _require_fitting(parts: Described) -> None:
    """Raise ConfigurationError unless each part's width is that of what it is handed."""
    unet, encoders = parts.network.config, list(parts.encoders.values())
    require_channels(parts.network, parts.vae.config.latent_channels)
    adds = "text_time" if len(encoders) > 1 else None  # a pooled text, and the size of the picture
    known = {"addition_embed_type": adds, "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None}
    for name, expected in (known | {"time_cond_proj_dim": None}).items():
        if unet.get(name) != expected:
            usual = "a noisy latent, a timestep and a prompt" + (", its pooled text and its size" if adds else "")
            raise ConfigurationError(f"its UNet asks for other things than {usual} ({name}: {unet[name]}).")
    widths = {unet.cross_attention_dim} if isinstance(unet.cross_attention_dim, int) else {*unet.cross_attention_dim}
    made = sum(encoder.config.hidden_size for encoder in encoders)
    if widths != {made}:
        raise ConfigurationError(
            f"its UNet reads conditions of {', '.join(map(str, sorted(widths)))} numbers, its text encoder makes them "
            f"of {made}."
        )
    if adds:
        pooled = encoders[-1].config.projection_dim
        needed = pooled + 6 * unet.addition_time_embed_dim  # six numbers tell the picture's size
        if pooled > made or unet.projection_class_embeddings_input_dim != needed:
            raise ConfigurationError(
                f"its UNet reads a pooled text and sizes of {unet.projection_class_embeddings_input_dim} numbers, its "
                f"second text encoder and they make {needed}."
            )
    require_autoencoder(parts.vae)
    path_of(parts.scheduler)

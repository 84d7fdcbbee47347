"""Options of models and of CLIP that cannot work together, and images that a model cannot draw: one sentence each.

As method_options.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unlearn_runner.errors import ConfigurationError


def levels_of_attention(weights: str, attention: Sequence[bool], block_out_channels: Sequence[int]) -> None:
    if weights == "auto" and len(attention) != len(block_out_channels):
        raise ConfigurationError(
            f"model.network.attention must have one entry for each of the {len(block_out_channels)} "
            f"block_out_channels, got {len(attention)}."
        )


def groups_of_channels(weights: str, block_out_channels: Sequence[int], norm_num_groups: int) -> None:
    if weights == "auto" and any(channels % norm_num_groups for channels in block_out_channels):
        raise ConfigurationError(
            "model.network.block_out_channels must be one or more numbers that divide by norm_num_groups="
            f"{norm_num_groups}, got {list(block_out_channels)}."
        )


def heads_of_channels(
    weights: str, block_out_channels: Sequence[int], attention: Sequence[bool], attention_head_dim: int
) -> None:
    # diffusers attends in the middle of the UNet, whose channels are the last, whatever `attention` says
    attended = [channels for channels, wanted in zip(block_out_channels, attention, strict=False) if wanted]
    if weights == "auto" and any(channels % attention_head_dim for channels in (*attended, block_out_channels[-1])):
        raise ConfigurationError(
            f"model.network.attention_head_dim must divide the channels that are attended to, got {attention_head_dim} "
            f"for block_out_channels={list(block_out_channels)}."
        )


def heads_of_latents(weights: str, block_out_channels: Sequence[int], attention_heads: int) -> None:
    if weights == "auto" and any(channels % attention_heads for channels in block_out_channels):
        raise ConfigurationError(
            f"model.network.attention_heads must divide block_out_channels={list(block_out_channels)}, got "
            f"{attention_heads}."
        )


def heads_of_texts(weights: str, text_width: int) -> None:
    if weights == "auto" and text_width % 4:
        raise ConfigurationError(f"model.network.text_width must divide by 4, got {text_width}.")


def classes_for_dit(conditional: bool) -> None:
    if not conditional:
        raise ConfigurationError("DiT draws under class labels, the dataset has none; take dataset.conditional=true.")


def t5_of_fresh(weights: str, t5: bool) -> None:
    if weights == "auto" and t5:
        raise ConfigurationError("model.network.t5 must be false with model.weights=auto: a small one has no T5.")


def width_of_transformer(weights: str, heads: int, attention_head_dim: int) -> None:
    if weights == "auto" and (heads * attention_head_dim % 4 or attention_head_dim % 2):
        raise ConfigurationError(
            "model.network.heads times model.network.attention_head_dim must divide by 4, and the latter by 2, got "
            f"{heads} and {attention_head_dim}."
        )


def channels_of_autoencoder(weights: str, vae: Mapping[str, Any] | None) -> None:
    if weights == "auto" and vae is not None:
        channels, groups = vae.get("block_out_channels", (16, 32)), vae.get("norm_num_groups", 8)
        if any(width % groups for width in channels):
            raise ConfigurationError(
                f"model.network.vae.block_out_channels must divide by norm_num_groups={groups}, got {list(channels)}."
            )


def range_of_betas(weights: str, beta_start: float, beta_end: float, beta_schedule: str) -> None:
    if weights == "auto" and beta_schedule != "squaredcos_cap_v2" and not beta_start <= beta_end:
        raise ConfigurationError(f"model.network.beta_start must be at most beta_end, got {beta_start} and {beta_end}.")


def flow_of_pixels(weights: str, prediction_type: str) -> None:
    if weights == "auto" and prediction_type == "flow":
        raise ConfigurationError(
            "model.network.prediction_type must be epsilon or v_prediction, got 'flow': flows are models of pixels so "
            "far, none of latents; take model=ddpm_tiny for one."
        )


def timesteps_of_flow(weights: str, prediction_type: str, num_train_timesteps: int) -> None:
    """At the last one there is no image; a likelihood needs two others."""
    if weights == "auto" and prediction_type == "flow" and num_train_timesteps < 3:
        raise ConfigurationError(
            f"model.network.num_train_timesteps must be at least 3 for a flow, got {num_train_timesteps}."
        )


def prediction_of_weights(weights: str, asked: str, there: str) -> None:
    """What weights predict is said by their folder; the option, where it is not the default, must agree."""
    if asked not in ("epsilon", there):
        raise ConfigurationError(
            f"model.network.prediction_type={asked}: model.weights={weights} predicts {there}, by its scheduler; leave "
            "prediction_type out, or give other weights."
        )


def heads_of_clip(width: int, text_width: int, heads: int) -> None:
    for name, value in (("width", width), ("text_width", text_width)):
        if value % heads:
            raise ConfigurationError(f"clip.network.{name} must divide by heads={heads}, got {value}.")


def patches_of_clip(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        raise ConfigurationError(f"clip.network.image_size must divide by patch_size={patch_size}, got {image_size}.")


def prompts_for_texts(prompts: bool) -> None:
    if not prompts:
        raise ConfigurationError(
            "model: Stable Diffusion draws under prompts, and the dataset has none; take dataset=sd_concepts, or "
            "dataset=request with dataset.captions=auto."
        )


def require_steps(num_inference_steps: int, num_train_timesteps: int, option: str) -> None:
    """No more steps of sampling than the schedule has."""
    if num_inference_steps > num_train_timesteps:
        raise ConfigurationError(
            f"{option} must be at most {num_train_timesteps}, the timesteps of the model's schedule; got "
            f"{num_inference_steps}."
        )


def sides_that_halve(height: int, width: int, halvings: int, blocks: int) -> None:
    if height % 2**halvings or width % 2**halvings:
        raise ConfigurationError(
            f"model.network: {blocks} blocks halve the image {halvings} times, so its sides must divide by "
            f"{2**halvings}; the dataset's are {height} x {width}. Choose another dataset.image_size or fewer blocks."
        )


def sides_of_latents(height: int, width: int, sides: int) -> None:
    if height % sides or width % sides:
        raise ConfigurationError(
            f"model: this Stable Diffusion draws images whose sides divide by {sides}; the dataset's are "
            f"{height} x {width}, choose another dataset.image_size."
        )


def teachable(has_recipe: bool, has_corpus: bool, weights: str, from_base: bool) -> None:
    """Whether the base can be had."""
    if weights == "auto" and not has_recipe:
        raise ConfigurationError(
            "model.weights must be a folder or a hub id, got 'auto': model.pretraining is null, so there is no recipe "
            "to train a base by."
        )
    if from_base and weights == "auto" and not has_corpus:
        raise ConfigurationError(
            "dataset.source=base: this model's base would have to draw the images that it learns from; give "
            "model.weights, or another source."
        )


def retrainable(option: str, has_corpus: bool, weights: str, instead: str) -> None:
    """Whether the base's recipe on the retained images makes a model that differs from the base by these alone."""
    if weights != "auto":
        raise ConfigurationError(
            f"{option} retrains by model.pretraining, but how model.weights={weights} was trained is not known, so the "
            f"two could differ by their recipes and not by the forget set; {instead}."
        )
    if has_corpus:
        raise ConfigurationError(
            f"{option} retrains on the dataset without the forget set, but this model's base learns from "
            f"model.pretraining.corpus and not from the dataset, so the two would differ by more; {instead}."
        )


def ratios_of_schedule(network: Mapping[str, Any], timesteps: int) -> tuple[float, float]:
    """The least and the largest ratio of noise to image of the schedule that is made of a network's options."""
    if network.get("prediction_type") == "flow":
        return 1 / (timesteps - 1), float(timesteps - 1)  # at the last timestep there is no image
    ends = (network["beta_start"], network["beta_end"])

    def cosine(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    def along(t: int, start: float, end: float) -> float:
        return start + (end - start) * t / (timesteps - 1)

    beta = {
        "linear": lambda t: along(t, *ends),
        "scaled_linear": lambda t: along(t, *map(math.sqrt, ends)) ** 2,
        "squaredcos_cap_v2": lambda t: min(1 - cosine(t + 1) / cosine(t), 0.999),
    }[network["beta_schedule"]]
    signals = 1 - beta(0), math.prod(1 - beta(t) for t in range(timesteps))
    return tuple(math.sqrt(1 / signal - 1) for signal in signals)


OF_CONSTRUCTORS: dict[str, tuple[Callable[..., None], ...]] = {
    "models.ddpm.build_ddpm": (
        levels_of_attention,
        groups_of_channels,
        heads_of_channels,
        range_of_betas,
        timesteps_of_flow,
    ),
    "models.vae.build_vae": (groups_of_channels,),
    "models.stable_diffusion.build_stable_diffusion": (
        flow_of_pixels,
        groups_of_channels,
        heads_of_latents,
        heads_of_texts,
        channels_of_autoencoder,
        range_of_betas,
    ),
    "models.clip.small_clip": (
        heads_of_clip,
        patches_of_clip,
    ),
}

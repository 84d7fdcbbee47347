"""Stable Diffusion 3 and 3.5 (2403.03206): a flow of latents by a transformer that reads three text encoders."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor, nn

from unlearn_runner import rules
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import path_of
from unlearn_runner.models.pipelines import Described, PipelineKind, described
from unlearn_runner.models.prompted import Parts, Tuning
from unlearn_runner.models.stable_diffusion import fitting_dataset, require_autoencoder
from unlearn_runner.models.texts import Texts, last_of_clip, last_of_t5, with_pooled
from unlearn_runner.options import Width

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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

    t5_tokens = 256  # as the pipeline has it

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], width: int):
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = [*encoders, None][:3]
        self.tokenizer, self.tokenizer_2, self.tokenizer_3 = [*tokenizers, None][:3]
        self.width = width

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
    trainable: Literal["full", "cross_attention", "cross_attention_kv", "not_cross_attention", "lora"] = "lora",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = True,
    guidance_scale: Annotated[float, Ge(1), Le(1000)] = 7.0,  # 1 is none
    t5: bool = True,
) -> Diffusion:
    """Stable Diffusion 3 or 3.5 that draws under the prompts `label_names`.

    `weights` is a folder or hub id of a StableDiffusion3Pipeline, which decides architecture and path; it is checked
    here and its weights are read later, by `load`. Without `t5`, the largest of its text encoders (9 GB in 16 bits), it
    draws as the pipeline does without it.
    """
    rules.prompts_for_texts(bool(label_names))
    found = described(weights, KIND, _require_fitting, () if t5 else ("text_encoder_3",))
    texts = ClipPairAndT5(
        list(found.tokenizers.values()), list(found.encoders.values()), found.network.config.joint_attention_dim
    )
    parts = Parts(found.vae, texts, found.network, found.scheduler)
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing)
    model = fitting_dataset(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)
    most = found.network.config.pos_embed_max_size * found.network.config.patch_size
    if max(model.sample_shape[1:]) > most:
        raise ConfigurationError(
            f"model.weights={weights} knows places of latents of up to {most} x {most}, and the dataset's images make "
            f"{model.sample_shape[1]} x {model.sample_shape[2]}; choose a smaller dataset.image_size."
        )
    return model


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

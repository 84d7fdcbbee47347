"""Stable Diffusion 1.x, 2.x and XL: diffusers' text-to-image parts behind the face that methods and evaluation use."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, final

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Shaped
from torch import Tensor

from unlearn_runner import rules
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Backbone, Diffusion
from unlearn_runner.models.latents import Latents
from unlearn_runner.models.loading import (
    check_weights,
    json_in,
    network_in,
    reading,
    reading_part,
    require_channels,
    require_kind,
    scheduler_in,
)
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import path_of
from unlearn_runner.models.texts import (
    ClipPair,
    ClipTexts,
    Texts,
    build_tokenizer,
    keep_libraries_quiet,
    require_vocabulary,
    tokenizer_in,
    tokenizer_of,
)
from unlearn_runner.options import AutoencoderOptions, Channels, Depth, OpenUnitInterval, PredictionType, Width
from unlearn_runner.spec import Labels
from unlearn_runner.weights import fetched, located

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}  # of a pipeline, with their kinds
ENCODERS = {  # of each kind of pipeline, the kinds of its text encoders
    "StableDiffusionPipeline": {"text_encoder": "CLIPTextModel"},
    "StableDiffusionXLPipeline": {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
}
MODELS = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}  # what to take for a pipeline
CROSS_ATTENTION = {  # by `trainable`: whether unlearning moves the weight of this name
    "cross_attention": lambda name: ".attn2." in name,
    "cross_attention_kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "not_cross_attention": lambda name: ".attn2." not in name,
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Parts(NamedTuple):
    """What a text-to-image pipeline is made of."""

    vae: "AutoencoderKL"
    texts: Texts
    unet: "UNet2DConditionModel"
    scheduler: "SchedulerMixin"


class Tuning(NamedTuple):
    """Which of the UNet's weights unlearning moves, and how.

    "full": all of them; "cross_attention": those that read the prompt (ESD-x, 2303.07345); "cross_attention_kv": of
    these the keys' and values' alone (ESD-x-strict of its code; Concept Ablation's, 2303.13516);
    "not_cross_attention": all others (ESD-u); "lora": low-rank additions (2106.09685) to all attention projections,
    which `save` adds to the weights.
    """

    trainable: str = "full"
    lora_rank: int = 4
    gradient_checkpointing: bool = False  # of the UNet: less memory for a second pass forward


@final
class TextUNet(Backbone):
    """UNet2DConditionModel under what `texts` read of prompts.

    Conditions are indices [b] into `prompts`, whose embeddings are computed once, or embeddings [b, s, d] as `embed`
    makes them.

    Unlearning moves (part of) the UNet; text encoders stay as they are.
    """

    flows = False

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        texts: Texts,
        prompts: tuple[str, ...],
        tuning: Tuning = Tuning(),  # noqa: B008 - immutable
        seed: int = 0,
    ):
        super().__init__()
        self.texts, self.unet = texts, unet
        self.prompts = prompts
        self.tuning = tuning
        self.seed = seed  # of LoRA's first weights
        self._known: Tensor | None = None  # embeddings of the prompts and of what guidance leads away from
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_embeddings())

    @property
    def num_labels(self) -> int:
        return len(self.prompts)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        return self.texts.embed(prompts)

    def num_tokens(self, text: str) -> int:
        return self.texts.spellings()[0].count(text)

    def text_projections(self) -> list[torch.nn.Module]:
        modules = self.unet.named_modules()
        return [module for name, module in modules if name.endswith((".attn2.to_k", ".attn2.to_v"))]

    def embeddings(self, cond: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b s d"]:
        if cond.is_floating_point():
            return cond
        if any(weight.requires_grad for weight in self.texts.parameters()):
            return self._embedded()[cond]
        if self._known is None:
            # normal tensors even in inference mode, so that training may use them later
            with torch.inference_mode(False), torch.no_grad():
                self._known = self._embedded()
        return self._known[cond]

    def _embedded(self) -> Float[Tensor, "n s d"]:
        """Of all prompts, and of what guidance leads away from, whose number is -1."""
        return torch.cat([self.embed(self.prompts), self.texts.empty()])

    def conditions(self, cond: Shaped[Tensor, "b ..."]) -> Condition:
        return self.texts.condition(self.embeddings(cond))

    def empty(self, count: int) -> Condition:
        return self.conditions(torch.full((count,), -1, device=self.unet.device))

    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        more = None if condition.pooled is None else {"text_embeds": condition.pooled, "time_ids": condition.sizes}
        return self.unet(x_t, time, condition.tokens, added_cond_kwargs=more, return_dict=False)[0]

    def freeze_for_unlearning(self) -> None:
        """All but what `tuning` names; LoRA's additions are made here."""
        self.texts.requires_grad_(False).eval()
        trainable, lora_rank, gradient_checkpointing = self.tuning
        self.unet.requires_grad_(trainable == "full")
        if trainable in CROSS_ATTENTION:
            for name, weight in self.unet.named_parameters():
                weight.requires_grad_(CROSS_ATTENTION[trainable](name))
        elif trainable == "lora":
            from peft import LoraConfig

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.unet.add_adapter(
                    LoraConfig(
                        r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS, init_lora_weights="gaussian"
                    )
                )
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        return {**self.texts.networks, "unet": self.unet}

    @property
    def components(self) -> dict[str, Any]:
        """LoRA's additions are added to the UNet's weights."""
        unet = self.unet
        if self._has_lora():
            unet = copy.deepcopy(unet)
            unet.fuse_lora()
            unet.unload_lora()
        return {**self.texts.components, "unet": unet}

    def save(self, components: dict[str, Any], folder: Path) -> None:
        """A folder for the pipeline's `from_pretrained`, LoRA added to the weights.

        LoRA alone lies beside it in lora/, for the pipeline's `load_lora_weights`.
        """
        keep_libraries_quiet()
        pipeline = self.texts.pipeline()
        if self._has_lora():
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            alone = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
            pipeline.save_lora_weights(str(Path(folder, "lora")), unet_lora_layers=alone)
        pipeline(**components, **self.texts.pipeline_options).save_pretrained(folder, safe_serialization=True)

    def require(self, folder: Path) -> None:
        self.texts.require(folder)

    def take(self, folder: Path) -> None:
        self.texts.take(folder)
        self._forget_embeddings()

    def _has_lora(self) -> bool:
        return getattr(self.unet, "peft_config", None) is not None

    def _forget_embeddings(self) -> None:
        self._known = None


def text_to_image(
    parts: Parts,
    image_shape: tuple[int, int, int],
    prompts: tuple[str, ...],
    guidance_scale: float = 7.5,
    tuning: Tuning = Tuning(),  # noqa: B008 - immutable
    seed: int = 0,
) -> Diffusion:
    """Latent diffusion under prompts (2112.10752; XL: 2307.01952), of a pipeline's parts."""
    backbone = TextUNet(parts.unet, parts.texts, prompts, tuning, seed)
    return Diffusion(backbone, Latents(parts.vae, image_shape), parts.scheduler, guidance_scale)


def build_stable_diffusion(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Literal["full", "cross_attention", "cross_attention_kv", "not_cross_attention", "lora"] = "full",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = False,
    guidance_scale: Annotated[float, Ge(1), Le(1000)] = 7.5,  # 1 is none
    prediction_type: PredictionType = "epsilon",
    block_out_channels: Channels = (32, 64),
    layers_per_block: Depth = 1,
    attention_heads: Width = 4,
    norm_num_groups: Width = 8,
    vae: AutoencoderOptions | None = None,
    text_width: Width = 64,
    text_layers: Depth = 2,
    num_tokens: Annotated[int, Ge(3), Le(1024)] = 24,
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
    rules.prompts_for_texts(bool(label_names))
    rules.flow_of_pixels(weights, prediction_type)
    rules.groups_of_channels(weights, block_out_channels, norm_num_groups)
    rules.heads_of_latents(weights, block_out_channels, attention_heads)
    rules.heads_of_texts(weights, text_width)
    rules.channels_of_autoencoder(weights, vae)
    rules.range_of_betas(weights, beta_start, beta_end, beta_schedule)
    if weights == "auto":
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        tokenizer = build_tokenizer(words, num_tokens)
        vae = {"block_out_channels": (16, 32), "latent_channels": 4, "norm_num_groups": 8} | (vae or {})
        halvings = len(vae["block_out_channels"]) - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
            parts = Parts(
                vae=AutoencoderKL(
                    in_channels=image_shape[0],
                    out_channels=image_shape[0],
                    down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
                    up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
                    layers_per_block=1,
                    sample_size=image_shape[1],
                    **vae,
                ),
                texts=ClipTexts(
                    tokenizer,
                    CLIPTextModel(
                        CLIPTextConfig(
                            vocab_size=len(tokenizer),
                            hidden_size=text_width,
                            intermediate_size=4 * text_width,
                            projection_dim=text_width,
                            num_hidden_layers=text_layers,
                            num_attention_heads=4,
                            max_position_embeddings=num_tokens,
                            bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id,
                        )
                    ),
                ),
                unet=UNet2DConditionModel(
                    sample_size=image_shape[1] // 2**halvings,
                    in_channels=vae["latent_channels"],
                    out_channels=vae["latent_channels"],
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
        parts = _configured_as(weights, "StableDiffusionPipeline", tuple(image_shape))
        rules.prediction_of_weights(weights, prediction_type, parts.scheduler.config.prediction_type)
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing)
    return _fitting(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)


def build_sdxl(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    trainable: Literal["full", "cross_attention", "cross_attention_kv", "not_cross_attention", "lora"] = "lora",
    lora_rank: Width = 4,
    gradient_checkpointing: bool = True,
    guidance_scale: Annotated[float, Ge(1), Le(1000)] = 5.0,  # 1 is none
) -> Diffusion:
    """SDXL that draws under the prompts `label_names`, its base model alone; the refiner is not needed.

    `weights` is a folder or hub id of a StableDiffusionXLPipeline, which decides architecture and schedule; it is
    checked here and its weights are read later, by `load`.
    """
    rules.prompts_for_texts(bool(label_names))
    parts = _configured_as(weights, "StableDiffusionXLPipeline", tuple(image_shape))
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing)
    return _fitting(parts, weights, image_shape, label_names, guidance_scale, tuning, seed)


def _fitting(
    parts: Parts,
    weights: str,
    image_shape: Sequence[int],
    label_names: Sequence[str],
    guidance_scale: float,
    tuning: Tuning,
    seed: int,
) -> Diffusion:
    """The model of these parts, if they fit the dataset's images and prompts."""
    sides = 2 ** (len(parts.vae.config.block_out_channels) + len(parts.unet.config.block_out_channels) - 2)
    rules.sides_of_latents(*image_shape[1:], sides)
    if parts.vae.config.in_channels != image_shape[0]:
        raise ConfigurationError(
            f"model.weights={weights} draws images of {parts.vae.config.in_channels} channels, the dataset has "
            f"{image_shape[0]}; choose weights and a dataset that fit each other."
        )
    model = text_to_image(parts, tuple(image_shape), tuple(label_names), guidance_scale, tuning, seed)
    model.backbone.texts.tokens(model.prompts)  # says what is not read of them
    return model


def _configured_as(weights: str, kind: str, image_shape: tuple[int, int, int]) -> Parts:
    """The parts that the folder or hub id of a pipeline of this kind describes, all but the tokenizers with whatever
    weights.

    Raises ConfigurationError, naming the part, if one cannot be had, or does not fit the others.
    """
    source = located(weights, "model.weights")
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    encoders = ENCODERS[kind]

    def text_encoder(name: str) -> torch.nn.Module:
        json_in(folder / name / "config.json")
        with torch.random.fork_rng(devices=[]):  # the first weights, which `load` replaces, cost no one a draw
            return getattr(transformers, encoders[name])(CLIPTextConfig.from_pretrained(folder / name))

    keep_libraries_quiet()
    folders = ("unet", "vae", *encoders, *map(tokenizer_of, encoders), "scheduler")
    expected = (
        f"a folder with a {kind} of diffusers ({', '.join(f'{name}/' for name in folders)}), or a hub id that can be "
        "reached, or download it elsewhere and give the folder"
    )
    with reading("model.weights", weights, expected):
        folder = fetched(source, weights=False)
    found: dict[str, Any] = {}
    for name, make in (
        ("model_index.json", partial(_require_pipeline, folder, kind)),
        ("unet", partial(network_in, UNet2DConditionModel, folder / "unet")),
        ("vae", partial(network_in, AutoencoderKL, folder / "vae")),
        *((name, partial(text_encoder, name)) for name in encoders),
        *((name, partial(tokenizer_in, folder, name)) for name in map(tokenizer_of, encoders)),
        ("scheduler", partial(scheduler_in, folder)),
    ):
        with reading("model.weights", weights, expected), reading_part(name):
            found[name] = make()
    with reading("model.weights", weights, "parts that fit each other"):
        _require_fitting(found, list(encoders))
    with reading("model.weights", weights, expected):
        if isinstance(source, Path):
            check_weights({name: found[name] for name in ("unet", "vae", *encoders)}, folder)
    pairs = [part for name in encoders for part in (found[tokenizer_of(name)], found[name])]
    if len(encoders) == 1:
        texts: Texts = ClipTexts(*pairs)
    else:
        zeros = bool(found["model_index.json"].get("force_zeros_for_empty_prompt", True))
        texts = ClipPair(*pairs, size=image_shape[1:], zeros_for_empty=zeros)
    return Parts(found["vae"], texts, found["unet"], found["scheduler"])


def _require_pipeline(folder: Path, kind: str) -> dict[str, Any]:
    """What a folder's index says, if it is that of a pipeline of this kind."""
    index = json_in(folder / "model_index.json")
    name = index.get("_class_name")
    if name != kind:
        instead = next((f"; take model={model}" for pipeline, model in MODELS.items() if pipeline == name), "")
        raise ConfigurationError(f"it is a {name}{instead}")
    tokenizers = {tokenizer_of(encoder): "CLIPTokenizer" for encoder in ENCODERS[kind]}
    for part, expected in (NETWORKS | ENCODERS[kind] | tokenizers).items():
        found = (index.get(part) or [None])[-1]
        require_kind(folder / part, found and found.removesuffix("Fast"), expected)
    return index


def _require_fitting(parts: dict[str, Any], encoders: list[str]) -> None:
    """Raise ConfigurationError unless each part's width is that of what it is handed."""
    unet, vae = parts["unet"].config, parts["vae"].config
    require_channels(parts["unet"], vae.latent_channels)
    adds = "text_time" if len(encoders) > 1 else None  # a pooled text, and the size of the picture
    known = {"addition_embed_type": adds, "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None}
    for name, expected in (known | {"time_cond_proj_dim": None}).items():
        if unet.get(name) != expected:
            usual = "a noisy latent, a timestep and a prompt" + (", its pooled text and its size" if adds else "")
            raise ConfigurationError(f"its UNet asks for other things than {usual} ({name}: {unet[name]}).")
    widths = {unet.cross_attention_dim} if isinstance(unet.cross_attention_dim, int) else {*unet.cross_attention_dim}
    made = sum(parts[name].config.hidden_size for name in encoders)
    if widths != {made}:
        raise ConfigurationError(
            f"its UNet reads conditions of {', '.join(map(str, sorted(widths)))} numbers, its text encoder makes them "
            f"of {made}."
        )
    if adds:
        pooled = parts[encoders[-1]].config.projection_dim
        needed = pooled + 6 * unet.addition_time_embed_dim  # six numbers tell the picture's size
        if pooled > made or unet.projection_class_embeddings_input_dim != needed:
            raise ConfigurationError(
                f"its UNet reads a pooled text and sizes of {unet.projection_class_embeddings_input_dim} numbers, its "
                f"second text encoder and they make {needed}."
            )
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name) is not None:
            raise ConfigurationError(f"its autoencoder shifts its latents ({name}), which is not read here.")
    if vae.in_channels != vae.out_channels:
        raise ConfigurationError(f"its autoencoder turns {vae.in_channels} channels into {vae.out_channels}.")
    for name in encoders:
        require_vocabulary(parts[tokenizer_of(name)], parts[name])
    path_of(parts["scheduler"])


def require_told_apart(model: Diffusion, labels: Labels) -> None:
    """Raise ConfigurationError if the text encoder reads a prompt to forget and one to retain as the same tokens."""
    rows = [tuple(row) for row in model.backbone.texts.tokens(model.prompts).tolist()]
    kept = {rows[label]: label for label in labels.retain}
    for label in labels.forget:
        other = kept.get(rows[label])
        if other is not None and other != label:
            raise ConfigurationError(
                f"dataset: the model's text encoder reads the prompts '{model.prompts[label]}', to forget, and "
                f"'{model.prompts[other]}', to retain, as the same tokens; choose prompts that differ in more than "
                "case, or than what follows the last token that it reads."
            )

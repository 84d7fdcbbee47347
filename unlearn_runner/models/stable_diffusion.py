"""Stable Diffusion 1.x and 2.x: diffusers' text-to-image parts behind the face that methods and evaluation use."""

import copy
import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, final

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner import rules
from unlearn_runner.distributed import in_shares
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.models.diffusion import Backbone, Codec, Diffusion
from unlearn_runner.models.loading import (
    BASES_ARCHITECTURE,
    check_weights,
    fitting,
    json_in,
    load_weights,
    network_in,
    reading,
    reading_part,
    require_channels,
    require_kind,
    scheduler_in,
)
from unlearn_runner.models.model import (
    Condition,
    GenerativeModel,
    Noising,
    clipped,
    passed,
    squared_error,
)
from unlearn_runner.models.path import path_of
from unlearn_runner.models.words import build_tokenizer
from unlearn_runner.options import AutoencoderOptions, Channels, Depth, OpenUnitInterval, PredictionType, Width
from unlearn_runner.spec import Labels
from unlearn_runner.weights import fetched, located

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer

PIPELINE = {  # the kinds of its networks, and of what reads the prompts
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
CROSS_ATTENTION = {  # by `trainable`: whether unlearning moves the weight of this name
    "cross_attention": lambda name: ".attn2." in name,
    "cross_attention_kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "not_cross_attention": lambda name: ".attn2." not in name,
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def pixels_a_side(vae: "AutoencoderKL") -> int:
    """Of the square of pixels that one place of a latent stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Parts(NamedTuple):
    """What a StableDiffusionPipeline is made of."""

    vae: "AutoencoderKL"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
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
class Latents(Codec):
    """An autoencoder's means times its scaling factor, [b, l, i, j] (Rombach et al. 2022, 2112.10752)."""

    exact = False

    def __init__(self, vae: "AutoencoderKL", image_shape: tuple[int, int, int]):
        super().__init__()
        self.vae, self.image_shape = vae, image_shape
        self.vae.requires_grad_(False).eval()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, *(side // pixels_a_side(self.vae) for side in self.image_shape[1:]))

    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l i j"]:
        if tuple(x0.shape[1:]) == self.sample_shape:
            return x0
        with torch.no_grad():
            means = in_shares(lambda part: self.vae.encode(part).latent_dist.mean, x0.to(self.vae.dtype))
            return means * self.vae.config.scaling_factor

    def picture(self, x0: Float[Tensor, "b l i j"]) -> Float[Tensor, "b c h w"]:
        with torch.no_grad():
            latents = x0 / self.vae.config.scaling_factor
            return clipped(in_shares(lambda part: self.vae.decode(part, return_dict=False)[0], latents))

    @property
    def networks(self) -> dict[str, Any]:
        return {"vae": self.vae}

    @property
    def components(self) -> dict[str, Any]:
        return {"vae": self.vae}

    def require(self, folder: Path) -> None:
        pass

    def take(self, folder: Path) -> None:
        from diffusers import AutoencoderKL

        scaling_factor = AutoencoderKL.load_config(folder / "vae").get("scaling_factor", 0.18215)
        self.vae.register_to_config(scaling_factor=scaling_factor)

    def adopt(self, vae: "AutoencoderKL") -> None:
        """Take over an autoencoder of the same architecture, with its scaling factor."""
        self.vae.load_state_dict(vae.state_dict())
        self.vae.register_to_config(scaling_factor=vae.config.scaling_factor)


@final
class TextUNet(Backbone):
    """UNet2DConditionModel under one text encoder's hidden states.

    Conditions are indices [b] into `prompts`, whose embeddings are computed once, or embeddings [b, s, d] as `embed`
    makes them. The empty condition is the prompt "".

    Unlearning moves (part of) the UNet; the text encoder stays as it is.
    """

    flows = False

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        prompts: tuple[str, ...],
        tuning: Tuning = Tuning(),  # noqa: B008 - immutable
        seed: int = 0,
    ):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.prompts = prompts
        self.tuning = tuning
        self.seed = seed  # of LoRA's first weights
        self._known: Tensor | None = None  # embeddings of the prompts and of ""
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_embeddings())
        self._take_tokenizer(tokenizer)

    def _take_tokenizer(self, tokenizer: "CLIPTokenizer") -> None:
        self.tokenizer = tokenizer
        self._called_tokenizer = copy.deepcopy(tokenizer)  # calls leave traces in what it saves

    @property
    def num_labels(self) -> int:
        return len(self.prompts)

    @property
    def _most_tokens(self) -> int:
        """How many the text encoder reads."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def tokens(self, prompts: Sequence[str]) -> Int64[Tensor, "n s"]:
        """What the text encoder reads of any texts. It is said which are longer than that, and which read the same."""
        length = self._most_tokens
        tokenizer, texts = self._called_tokenizer, list(prompts)
        whole = tokenizer(texts, truncation=False, padding=False, verbose=False).input_ids
        cut = [f"'{text}'" for text, row in zip(texts, whole, strict=True) if len(row) > length]
        if cut:
            _say(f"only the first {length} tokens of a prompt are read; these are longer: {', '.join(cut)}")
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        alike: dict[tuple[int, ...], set[str]] = {}
        for text, row in zip(texts, ids.tolist(), strict=True):
            alike.setdefault(tuple(row), set()).add(text)
        for same in alike.values():
            if len(same) > 1:
                _say(f"these prompts are one condition to the text encoder: {', '.join(map(repr, sorted(same)))}")
        return ids

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        """The text encoder's last hidden states, as the pipeline takes them."""
        return self.text_encoder(self.tokens(prompts).to(self.text_encoder.device), return_dict=False)[0]

    def num_tokens(self, text: str) -> int:
        read = self._called_tokenizer(text, truncation=False, padding=False, verbose=False).input_ids
        return min(len(read), self._most_tokens)

    def text_projections(self) -> list[torch.nn.Module]:
        modules = self.unet.named_modules()
        return [module for name, module in modules if name.endswith((".attn2.to_k", ".attn2.to_v"))]

    def conditions(self, cond: Shaped[Tensor, "b ..."]) -> Condition:
        """Of prompts given by index, -1 being the empty one, or by embedding."""
        if cond.is_floating_point():
            return Condition(tokens=cond)
        if any(weight.requires_grad for weight in self.text_encoder.parameters()):
            return Condition(tokens=self.embed((*self.prompts, ""))[cond])
        if self._known is None:
            # normal tensors even in inference mode, so that training may use them later
            with torch.inference_mode(False), torch.no_grad():
                self._known = self.embed((*self.prompts, ""))
        return Condition(tokens=self._known[cond])

    def empty(self, count: int) -> Condition:
        return self.conditions(torch.full((count,), -1, device=self.text_encoder.device))

    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        return self.unet(x_t, time, encoder_hidden_states=condition.tokens, return_dict=False)[0]

    def freeze_for_unlearning(self) -> None:
        """All but what `tuning` names; LoRA's additions are made here."""
        self.text_encoder.requires_grad_(False).eval()
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
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    @property
    def components(self) -> dict[str, Any]:
        """LoRA's additions are added to the UNet's weights."""
        unet = self.unet
        if self._has_lora():
            unet = copy.deepcopy(unet)
            unet.fuse_lora()
            unet.unload_lora()
        return {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": unet}

    def save(self, components: dict[str, Any], folder: Path) -> None:
        """A folder for `StableDiffusionPipeline.from_pretrained`, LoRA added to the weights; without a safety checker.

        LoRA alone lies beside it in lora/, for the pipeline's `load_lora_weights`.
        """
        from diffusers import StableDiffusionPipeline

        _keep_libraries_quiet()
        if self._has_lora():
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            alone = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
            StableDiffusionPipeline.save_lora_weights(str(Path(folder, "lora")), unet_lora_layers=alone)
        StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder, safe_serialization=True)

    def require(self, folder: Path) -> None:
        """Raise ConfigurationError if there are tokens in a folder's vocabulary that the text encoder does not know."""
        _keep_libraries_quiet()
        with reading_part("tokenizer"):
            require_vocabulary(tokenizer_in(folder), self.text_encoder)

    def take(self, folder: Path) -> None:
        self._take_tokenizer(tokenizer_in(folder))
        self._forget_embeddings()

    def _has_lora(self) -> bool:
        return getattr(self.unet, "peft_config", None) is not None

    def _forget_embeddings(self) -> None:
        self._known = None


def stable_diffusion(
    parts: Parts,
    image_shape: tuple[int, int, int],
    prompts: tuple[str, ...],
    guidance_scale: float = 7.5,
    tuning: Tuning = Tuning(),  # noqa: B008 - immutable
    seed: int = 0,
) -> Diffusion:
    """Latent diffusion under prompts (Rombach et al. 2022, 2112.10752), of a StableDiffusionPipeline's parts."""
    backbone = TextUNet(parts.unet, parts.text_encoder, parts.tokenizer, prompts, tuning, seed)
    return Diffusion(backbone, Latents(parts.vae, image_shape), parts.scheduler, guidance_scale)


@final
class Autoencoder(GenerativeModel):
    """AutoencoderKL seen as a model of images of its own, so that what trains every base trains it, too.

    Its noisy sample is the unscaled latent z ~ q(z|x). `loss` is the squared error of the picture plus `kl_weight`
    times the one-sample estimate of KL(q(z|x) || N(0, I)), summed over pixels and entries.
    """

    num_train_timesteps = 1
    has_likelihood = False
    num_labels = None

    def __init__(self, vae: "AutoencoderKL", image_shape: tuple[int, int, int], kl_weight: float = 0.01):
        super().__init__()
        self.vae = vae
        self.image_shape = image_shape
        self.kl_weight = kl_weight
        self.network_evaluations = 0
        self.vae.requires_grad_(True)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, *(side // pixels_a_side(self.vae) for side in self.image_shape[1:]))

    @property
    def answer_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        def encode(part: Tensor) -> tuple[Tensor, Tensor]:
            posterior = self.vae.encode(part).latent_dist
            return posterior.mean, posterior.std

        return Noising(1.0, *passed(self, encode, x0))

    def predict(
        self,
        m: Float[Tensor, "b l i j"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        self.network_evaluations += len(m)
        return passed(self, lambda part: self.vae.decode(part, return_dict=False)[0], m)

    def loss(
        self,
        answer: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b l i j"],
        eps: Float[Tensor, "b l i j"],
        std: Float[Tensor, "b l i j"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        log_ratio = (m.square() - eps.square()) / 2 - std.log()  # log q(z|x0) - log p(z), entry by entry
        return squared_error(answer, x0) + self.kl_weight * log_ratio.flatten(1).sum(1)

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
        """The decoder's pictures of standard normal latents."""
        z = torch.randn((n, *self.sample_shape), generator=generator, device=self.vae.device)
        return torch.cat([self.vae.decode(part).sample for part in z.split(batch_size)]).clamp(-1, 1)

    def freeze_for_unlearning(self) -> None:
        self.vae.encoder.requires_grad_(False)

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(Path(folder) / "vae", safe_serialization=True)

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        with reading(option, source, BASES_ARCHITECTURE):
            return fitting({"vae": self.vae}, source, option)

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        load_weights({"vae": self.vae}, self.fits(source, option))

    @torch.no_grad()
    def measure_scale(self, images: Float[Tensor, "n c h w"]) -> None:
        """Make the scaling factor give these images' latents a standard deviation of 1 (2112.10752, appendix G)."""
        spread = torch.cat([self.vae.encode(part).latent_dist.mean for part in images.split(256)]).std()
        self.vae.register_to_config(scaling_factor=1 / float(spread))


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
                text_encoder=CLIPTextModel(
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
                tokenizer=tokenizer,
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
        parts = _configured_as(weights)
        rules.prediction_of_weights(weights, prediction_type, parts.scheduler.config.prediction_type)
    sides = 2 ** (len(parts.vae.config.block_out_channels) + len(parts.unet.config.block_out_channels) - 2)
    rules.sides_of_latents(*image_shape[1:], sides)
    if parts.vae.config.in_channels != image_shape[0]:
        raise ConfigurationError(
            f"model.weights={weights} draws images of {parts.vae.config.in_channels} channels, the dataset has "
            f"{image_shape[0]}; choose weights and a dataset that fit each other."
        )
    tuning = Tuning(trainable, lora_rank, gradient_checkpointing)
    model = stable_diffusion(parts, tuple(image_shape), tuple(label_names), guidance_scale, tuning, seed)
    model.backbone.tokens(model.prompts)  # says what is not read of them
    return model


def _configured_as(weights: str) -> Parts:
    """The parts that a pipeline's folder or hub id describes, all but the tokenizer with whatever weights.

    Raises ConfigurationError, naming the part, if one cannot be had, or does not fit the others.
    """
    source = located(weights, "model.weights")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def text_encoder() -> CLIPTextModel:
        json_in(folder / "text_encoder" / "config.json")
        with torch.random.fork_rng(devices=[]):  # the first weights, which `load` replaces, cost no one a draw
            return CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))

    _keep_libraries_quiet()
    expected = (
        "a folder with a StableDiffusionPipeline of diffusers (unet/, vae/, text_encoder/, tokenizer/, scheduler/), or "
        "a hub id that can be reached, or download it elsewhere and give the folder"
    )
    with reading("model.weights", weights, expected):
        folder = fetched(source, weights=False)
    found: dict[str, Any] = {}
    for name, make in (
        ("model_index.json", partial(_require_stable_diffusion, folder)),
        ("unet", partial(network_in, UNet2DConditionModel, folder / "unet")),
        ("vae", partial(network_in, AutoencoderKL, folder / "vae")),
        ("text_encoder", text_encoder),
        ("tokenizer", partial(tokenizer_in, folder)),
        ("scheduler", partial(scheduler_in, folder)),
    ):
        with reading("model.weights", weights, expected), reading_part(name):
            found[name] = make()
    del found["model_index.json"]
    parts = Parts(**found)
    with reading("model.weights", weights, "parts that fit each other"):
        _require_fitting(parts)
    with reading("model.weights", weights, expected):
        if isinstance(source, Path):
            check_weights({name: found[name] for name in ("unet", "vae", "text_encoder")}, folder)
    return parts


def _require_stable_diffusion(folder: Path) -> None:
    index = json_in(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise ConfigurationError(f"it is a {index.get('_class_name')}")
    for name, kind in PIPELINE.items():
        found = (index.get(name) or [None])[-1]
        require_kind(folder / name, found and found.removesuffix("Fast"), kind)


def _require_fitting(parts: Parts) -> None:
    """Raise ConfigurationError unless each part's width is that of what it is handed."""
    unet, vae, text_encoder = parts.unet.config, parts.vae.config, parts.text_encoder.config
    require_channels(parts.unet, vae.latent_channels)
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(name) is not None:
            raise ConfigurationError(
                f"its UNet asks for more than a noisy latent, a timestep and a prompt ({name}: {unet[name]})."
            )
    widths = {unet.cross_attention_dim} if isinstance(unet.cross_attention_dim, int) else {*unet.cross_attention_dim}
    if widths != {text_encoder.hidden_size}:
        raise ConfigurationError(
            f"its UNet reads conditions of {', '.join(map(str, sorted(widths)))} numbers, its text encoder makes them "
            f"of {text_encoder.hidden_size}."
        )
    if vae.in_channels != vae.out_channels:
        raise ConfigurationError(f"its autoencoder turns {vae.in_channels} channels into {vae.out_channels}.")
    require_vocabulary(parts.tokenizer, parts.text_encoder)
    path_of(parts.scheduler)


def tokenizer_in(folder: Path) -> "CLIPTokenizer":
    """The tokenizer of a pipeline. transformers builds one of three tokens where it finds no vocabulary."""
    from transformers import CLIPTokenizer

    json_in(folder / "tokenizer" / "tokenizer_config.json")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise ConfigurationError(
            f"the vocabulary in {folder / 'tokenizer'} is damaged ({first_line(error)})"
        ) from error
    if len(tokenizer) < 256:  # the bytes alone are as many
        raise ConfigurationError("the tokenizer's vocabulary is not there")
    return tokenizer


def require_vocabulary(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel") -> None:
    """Raise ConfigurationError if there are tokens that the text encoder has no embedding for."""
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ConfigurationError(
            f"its tokenizer knows {len(tokenizer)} tokens, its text encoder {text_encoder.config.vocab_size}."
        )


def require_told_apart(model: Diffusion, labels: Labels) -> None:
    """Raise ConfigurationError if the text encoder reads a prompt to forget and one to retain as the same tokens."""
    rows = [tuple(row) for row in model.backbone.tokens(model.prompts).tolist()]
    kept = {rows[label]: label for label in labels.retain}
    for label in labels.forget:
        other = kept.get(rows[label])
        if other is not None and other != label:
            raise ConfigurationError(
                f"dataset: the model's text encoder reads the prompts '{model.prompts[label]}', to forget, and "
                f"'{model.prompts[other]}', to retain, as the same tokens; choose prompts that differ in more than "
                "case, or than what follows the last token that it reads."
            )


@lru_cache
def _say(message: str) -> None:
    """Once, on standard error: a run builds its model several times."""
    logging.getLogger(__name__).warning(message)


def _keep_libraries_quiet() -> None:
    """No bars for files of a second, and none of the hub's retries: what went wrong is said in one sentence."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

"""Text-to-image models of diffusers' parts: a network under prompts, and which of its weights unlearning moves."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Backbone, Diffusion
from unlearn_runner.models.latents import Latents
from unlearn_runner.models.model import Condition
from unlearn_runner.models.texts import Texts, Word, keep_libraries_quiet
from unlearn_runner.spec import Labels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class NetworkKind(NamedTuple):
    """How a class of networks is called, and which of its weights read the prompt, by their names."""

    part: str  # its folder in a pipeline
    flows: bool  # whether it is known on flows, too
    patch: Callable[[nn.Module], int | None]  # numbers a side of the latents that it takes as one; None: it halves them
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    reads_prompt: tuple[str, ...]  # parts of the names of weights through which the picture learns of the prompt
    keys_and_values: tuple[str, ...]  # of these the keys' and the values'
    text_projections: tuple[str, ...]  # ends of the names of the linear layers that read the text encoders' states
    lora_targets: tuple[str, ...]


def _call_unet(unet: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    more = None if condition.pooled is None else {"text_embeds": condition.pooled, "time_ids": condition.sizes}
    return unet(x_t, time, condition.tokens, added_cond_kwargs=more, return_dict=False)[0]


def _call_joint_transformer(transformer: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return transformer(x_t, condition.tokens, condition.pooled, time, return_dict=False)[0]


def _call_flux(transformer: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Two by two numbers of each channel are one place of the picture."""
    b, c, h, w = (*x_t.shape[:2], x_t.shape[2] // 2, x_t.shape[3] // 2)
    rows, columns = (torch.arange(side, dtype=x_t.dtype, device=x_t.device) for side in (h, w))
    places = torch.cartesian_prod(x_t.new_zeros(1), rows, columns)
    prediction = transformer(
        x_t.reshape(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c),
        timestep=time / 1000,  # which the network multiplies by 1,000 again
        guidance=condition.guidance,
        encoder_hidden_states=condition.tokens,
        pooled_projections=condition.pooled,
        txt_ids=x_t.new_zeros(condition.tokens.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
    return prediction.reshape(b, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


UNET = NetworkKind(  # UNet2DConditionModel
    part="unet",
    flows=False,
    patch=lambda unet: None,
    call=_call_unet,
    reads_prompt=(".attn2.",),
    keys_and_values=(".attn2.to_k.", ".attn2.to_v."),
    text_projections=(".attn2.to_k", ".attn2.to_v"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
)
JOINT_TRANSFORMER = NetworkKind(  # SD3Transformer2DModel (2403.03206): picture and prompt attend to each other
    part="transformer",
    flows=True,
    patch=lambda transformer: transformer.config.patch_size,
    call=_call_joint_transformer,
    reads_prompt=("context_embedder.", ".add_q_proj.", ".add_k_proj.", ".add_v_proj.", ".to_add_out."),
    keys_and_values=(".add_k_proj.", ".add_v_proj."),
    text_projections=("context_embedder",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
FLUX = JOINT_TRANSFORMER._replace(patch=lambda transformer: 2, call=_call_flux)  # FluxTransformer2DModel
KINDS = {
    "UNet2DConditionModel": UNET,
    "SD3Transformer2DModel": JOINT_TRANSFORMER,
    "FluxTransformer2DModel": FLUX,
}


class Parts(NamedTuple):
    """What a text-to-image pipeline is made of."""

    vae: "AutoencoderKL"
    texts: Texts
    network: nn.Module
    scheduler: "SchedulerMixin"


class Tuning(NamedTuple):
    """Which of the network's weights unlearning moves, and how.

    "full": all of them; "cross_attention": those that read the prompt (ESD-x, 2303.07345); "cross_attention_kv": of
    these the keys' and values' alone (ESD-x-strict of its code; Concept Ablation's, 2303.13516);
    "not_cross_attention": all others (ESD-u); "lora": low-rank additions (2106.09685) to all attention projections,
    which `save` adds to the weights.

    `frozen_dtype`: "bfloat16" keeps what stays as it is in half the memory: the text encoders, which then compute in
    it, and the matrices and kernels of the network that are not trained, which lose nothing where it computes in
    bfloat16 anyway (`hardware.mixed_precision`).

    `texts_on_cpu`: the text encoders stay on the CPU: the conditions of a run are embedded once.
    """

    trainable: str = "full"
    lora_rank: int = 4
    gradient_checkpointing: bool = False  # of the network: less memory for a second pass forward
    frozen_dtype: str = "float32"
    texts_on_cpu: bool = False


@final
class Prompted(Backbone):
    """A network of diffusers' under what `texts` read of prompts.

    Conditions are indices [b] into `prompts`, whose embeddings are computed once, or embeddings [b, s, d] as `embed`
    makes them.

    Unlearning moves (part of) the network; text encoders stay as they are.
    """

    def __init__(
        self,
        network: nn.Module,
        texts: Texts,
        prompts: tuple[str, ...],
        tuning: Tuning = Tuning(),  # noqa: B008 - immutable
        seed: int = 0,
    ):
        super().__init__()
        self.texts = texts.eval()
        self._kind = KINDS[type(network).__name__]
        setattr(self, self._kind.part, network)
        self.prompts = prompts
        self.tuning = tuning
        self.seed = seed  # of LoRA's first weights
        self._known: Tensor | None = None  # embeddings of the prompts and of what guidance leads away from
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_embeddings())

    @property
    def flows(self) -> bool:
        return self._kind.flows

    @property
    def network(self) -> nn.Module:
        return getattr(self, self._kind.part)

    def places(self, shape: tuple[int, ...]) -> int | None:
        patch = self._kind.patch(self.network)
        return None if patch is None else (shape[1] // patch) * (shape[2] // patch)

    @property
    def num_labels(self) -> int:
        return len(self.prompts)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        return self.texts.embed(prompts).to(self.network.device, torch.float32)

    def last_tokens(self, text: str) -> list[tuple[int, int]]:
        return self.texts.last_tokens(text)

    def words(self) -> list[Word]:
        return self.texts.words()

    def slopes(self, text: str, count: int, cost: Callable[[Tensor], Tensor]) -> Float[Tensor, "{count} v"]:
        device = self.network.device
        return self.texts.slopes(text, count, lambda packed: cost(packed.to(device))).to(device)

    def text_projections(self) -> list[nn.Module]:
        return [module for name, module in self.network.named_modules() if name.endswith(self._kind.text_projections)]

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
        found = torch.cat([self.texts.embed(self.prompts), self.texts.empty()])
        return found.to(self.network.device, torch.float32)

    def conditions(self, cond: Shaped[Tensor, "b ..."]) -> Condition:
        return self.texts.condition(self.embeddings(cond))

    def empty(self, count: int) -> Condition:
        return self.conditions(torch.full((count,), -1, device=self.network.device))

    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        return self._kind.call(self.network, x_t, time, condition)

    def freeze_for_unlearning(self) -> None:
        """All but what `tuning` names; LoRA's additions are made here."""
        self.texts.requires_grad_(False).eval()
        trainable, lora_rank, gradient_checkpointing, frozen_dtype, texts_on_cpu = self.tuning
        self.network.requires_grad_(trainable == "full")
        if trainable not in ("full", "lora"):
            for name, weight in self.network.named_parameters():
                parts = self._kind.keys_and_values if trainable == "cross_attention_kv" else self._kind.reads_prompt
                weight.requires_grad_(any(part in name for part in parts) != (trainable == "not_cross_attention"))
        elif trainable == "lora":
            from peft import LoraConfig

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.network.add_adapter(
                    LoraConfig(
                        r=lora_rank,
                        lora_alpha=lora_rank,
                        target_modules=self._kind.lora_targets,
                        init_lora_weights="gaussian",
                    )
                )
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if frozen_dtype == "bfloat16":
            self.texts.to(torch.bfloat16)
            for module in self.network.modules():
                if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
                    module.weight.data = module.weight.data.to(torch.bfloat16)
        if texts_on_cpu:
            self.texts.stay()

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {**self.texts.networks, self._kind.part: self.network}

    @property
    def components(self) -> dict[str, Any]:
        """LoRA's additions are added to the network's weights."""
        network = self.network
        if self._has_lora():
            network = copy.deepcopy(network)
            network.fuse_lora()
            network.unload_lora()
        return {**self.texts.components, self._kind.part: network}

    def save(self, components: dict[str, Any], folder: Path) -> None:
        """A folder for the pipeline's `from_pretrained`, LoRA added to the weights.

        LoRA alone lies beside it in lora/, for the pipeline's `load_lora_weights`.
        """
        keep_libraries_quiet()
        if self._has_lora():
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            alone = get_peft_model_state_dict(self.network)
            if self._kind.part == "unet":  # the names that tools know a UNet's by
                alone = convert_state_dict_to_diffusers(alone)
            kind = self.texts.pipeline()
            kind.save_lora_weights(str(Path(folder, "lora")), **{f"{self._kind.part}_lora_layers": alone})
        self.pipeline(components).save_pretrained(folder, safe_serialization=True)

    def pipeline(self, components: dict[str, Any]) -> "DiffusionPipeline":
        keep_libraries_quiet()
        return self.texts.pipeline()(**components, **self.texts.pipeline_options)

    def require(self, folder: Path) -> None:
        self.texts.require(folder)

    def take(self, folder: Path) -> None:
        self.texts.take(folder)
        self._forget_embeddings()

    def _has_lora(self) -> bool:
        return getattr(self.network, "peft_config", None) is not None

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
    """Latent diffusion or a flow under prompts (2112.10752; XL: 2307.01952; 3: 2403.03206), of a pipeline's parts."""
    backbone = Prompted(parts.network, parts.texts, prompts, tuning, seed)
    return Diffusion(backbone, Latents(parts.vae, image_shape), parts.scheduler, guidance_scale)


def require_distinguished(model: Diffusion, labels: Labels) -> None:
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

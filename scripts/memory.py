"""What models that people run take in memory, by arithmetic: parameters are counted on the meta device, none is made.

    python scripts/memory.py                 # a table in Markdown
    python scripts/memory.py --rank 16

GiB of weights, gradients, the optimizer's moments and the average of the weights. What the forward pass keeps for the
backward pass comes on top: it depends on picture, batch and `gradient_checkpointing`, and has to be measured.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from unlearn_runner.models.flux import ClipAndT5
from unlearn_runner.models.prompted import KINDS, Parts, Tuning, text_to_image
from unlearn_runner.models.stable_diffusion_3 import ClipPairAndT5
from unlearn_runner.models.texts import ClipPair, ClipTexts, Texts, build_tokenizer

GIB = 2**30


def clip_l(projected: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, projection_dim=768,
        )
    )  # fmt: skip


def clip_big_g() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            max_position_embeddings=77, projection_dim=1280, hidden_act="gelu",
        )
    )  # fmt: skip


def t5_xxl() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def autoencoder(channels: int = 4) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=channels, norm_num_groups=32, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4,
    )  # fmt: skip


def unet_sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
    )  # fmt: skip


def unet_sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        layers_per_block=2, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def transformer_sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )  # fmt: skip


def transformer_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip


class Sizes(NamedTuple):
    """How a model's parts are made."""

    network: Callable[[], nn.Module]
    encoders: tuple[Callable[[], nn.Module], ...]
    autoencoder: Callable[[], nn.Module] = autoencoder


SIZES = {
    "sd15": Sizes(unet_sd15, (clip_l,)),
    "sdxl": Sizes(unet_sdxl, (clip_l, clip_big_g)),
    "sd3 without T5": Sizes(transformer_sd3, (lambda: clip_l(True), clip_big_g), lambda: autoencoder(16)),
    "sd3": Sizes(transformer_sd3, (lambda: clip_l(True), clip_big_g, t5_xxl), lambda: autoencoder(16)),
    "flux": Sizes(transformer_flux, (clip_l, t5_xxl), lambda: autoencoder(16)),
}  # the sizes of Stable Diffusion 1.5, SDXL's base, Stable Diffusion 3 medium, FLUX.1-dev


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def additions(network: nn.Module, rank: int) -> int:
    """How many weights LoRA of this rank has on what `trainable=lora` adds it to."""
    targets = KINDS[type(network).__name__].lora_targets
    layers = (part for name, part in network.named_modules() if isinstance(part, nn.Linear) and name.endswith(targets))
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


class Taken(NamedTuple):
    """Parameters, and GiB."""

    network: int
    texts: int
    autoencoder: int
    additions: int
    lora_float32: float
    lora_bfloat16: float
    full: float


def taken_by(name: str, rank: int = 4) -> Taken:
    """What a model's weights take while it unlearns by Adam with an average of the weights, one gradient at a time.

    LoRA: all weights stay, in 32 bits or, `frozen_dtype=bfloat16`, in 16 but for the autoencoder's; of the additions
    there are five copies (themselves, gradient, two moments, average) in 32 bits. Full: of the network there are five.
    """
    with torch.device("meta"):
        network, vae = SIZES[name].network(), count(SIZES[name].autoencoder())
        texts = sum(count(make()) for make in SIZES[name].encoders)
    own, added = count(network), additions(network, rank)
    trained = 5 * 4 * added
    return Taken(
        own, texts, vae, added,
        (4 * (own + texts + vae) + trained) / GIB,
        (2 * (own + texts) + 4 * vae + trained) / GIB,
        (5 * 4 * own + 4 * (texts + vae)) / GIB,
    )  # fmt: skip


def sized(name: str, tuning: Tuning, device: str = "cpu", size: int = 512) -> Any:
    """A model by its sizes, with random weights, for pictures of `size` x `size`; the network is made on `device`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler

    sizes = SIZES[name]
    with torch.device(device):
        network = sizes.network()
    encoders = [make() for make in sizes.encoders]
    tokenizers = [build_tokenizer([], 77) for _ in encoders]
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name in ("sd15", "sdxl"):
        scheduler = PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        )
    texts: Texts
    if name == "sd15":
        texts = ClipTexts(tokenizers[0], encoders[0])
    elif name == "sdxl":
        texts = ClipPair(tokenizers[0], encoders[0], tokenizers[1], encoders[1], (size, size))
    elif name.startswith("sd3"):
        texts = ClipPairAndT5(tokenizers, encoders, network.config.joint_attention_dim)
    else:
        texts = ClipAndT5(tokenizers, encoders)
    parts = Parts(sizes.autoencoder(), texts, network, scheduler)
    return text_to_image(parts, (3, size, size), ("a picture",), tuning=tuning)


def markdown(rank: int) -> str:
    lines = [
        f"| model | network | text encoders | autoencoder | LoRA, rank {rank} | LoRA | LoRA, frozen in bf16 | full |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SIZES:
        found = taken_by(name, rank)
        millions = (f"{part / 1e6:,.1f}M" for part in found[:4])
        gib = (f"{part:.1f} GiB" for part in found[4:])
        lines.append(f"| {name} | {' | '.join(millions)} | {' | '.join(gib)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    print(markdown(parser.parse_args().rank))

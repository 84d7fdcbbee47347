"""Small Stable Diffusions: ours, and one of another's making."""

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.stable_diffusion import Parts, Tuning, build_stable_diffusion, stable_diffusion
from unlearn_runner.models.words import build_tokenizer

PROMPTS = ("a picture of a seven", "trousers", "a picture of trousers")
TINY = {
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "vae": {"block_out_channels": [8, 8], "norm_num_groups": 4},
    "text_width": 16,
    "text_layers": 1,
    "num_tokens": 12,
    "words": ["seven", "trousers"],
}


def tiny(weights="auto", prompts=PROMPTS, image_shape=(3, 16, 16), seed=0, **more):
    return build_stable_diffusion(image_shape, None, seed, weights, prompts, **(TINY | more))


def foreign(folder, prediction_type="v_prediction"):
    """A pipeline of another's making: other sizes, three levels, another sampler, weights drawn at random."""
    torch.manual_seed(11)
    tokenizer = build_tokenizer(["zebra"], 20)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(4, 8, 8), norm_num_groups=2, latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.7, sample_size=32,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=20, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24, attention_head_dim=2, layers_per_block=1, use_linear_projection=True,
        ),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sd15_sized(trainable="lora", device="cpu", **tuning) -> Diffusion:
    """Stable Diffusion 1.5 by its sizes, with random weights, for pictures of 512x512; the UNet is made on `device`."""
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
        )  # fmt: skip
    tokenizer = build_tokenizer([], 77)
    parts = Parts(
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            latent_channels=4, norm_num_groups=32, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
    )  # fmt: skip
    return stable_diffusion(parts, (3, 512, 512), PROMPTS, tuning=Tuning(trainable, **tuning))

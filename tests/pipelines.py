"""Small Stable Diffusions: ours, and some of another's making."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unlearn_runner.models.stable_diffusion import build_stable_diffusion
from unlearn_runner.models.texts import build_tokenizer

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
    return build_stable_diffusion(image_shape, prompts, seed, weights, **(TINY | more))


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


def clip_config(tokenizer, width, layers):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=20, projection_dim=12, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def two_tokenizers():
    tokenizers = build_tokenizer(["zebra"], 20), build_tokenizer(["zebra"], 20)
    tokenizers[1].pad_token = "!"  # as SDXL's second
    return tokenizers


def foreign_xl(folder, prediction_type="epsilon", **more):
    """A Stable Diffusion XL of another's making: two text encoders of other widths, weights drawn at random."""
    torch.manual_seed(12)
    tokenizers = two_tokenizers()
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025, sample_size=32, force_upcast=True,
        ),
        text_encoder=CLIPTextModel(clip_config(tokenizers[0], 8, 2)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizers[1], 16, 3)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            cross_attention_dim=24, attention_head_dim=(2, 4), layers_per_block=1, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
            prediction_type=prediction_type, timestep_spacing="leading",
        ),
        add_watermarker=False,
        **more,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def small_t5(width):
    """A tokenizer of T5's that knows letters, and a configuration of its encoder."""
    letters = [(piece, -2.0) for piece in "abcdefghijklmnopqrstuvwxyz'.,"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    tokenizer = T5Tokenizer(vocab=pieces, model_max_length=512)
    return tokenizer, T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


def foreign_sd3(folder, shift=3.0, t5=True):
    """A Stable Diffusion 3 of another's making: a shifted flow, three text encoders, weights drawn at random."""
    torch.manual_seed(13)
    tokenizers = two_tokenizers()
    third, config = small_t5(48)
    StableDiffusion3Pipeline(
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=1.5305, shift_factor=0.0609, sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizers[0], 8, 2)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizers[1], 16, 3)),
        text_encoder_3=T5EncoderModel(config) if t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=third if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=24,
            pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def foreign_dit(folder, learnt_variance=True, classes=10, channels=1):
    """A DiT of another's making, whose weights are drawn at random."""
    torch.manual_seed(15)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8 if learnt_variance else 4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, num_embeds_ada_norm=classes,
    )  # fmt: skip
    DiTPipeline(
        vae=AutoencoderKL(
            in_channels=channels, out_channels=channels, block_out_channels=(4, 8), norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
            scaling_factor=0.18215, sample_size=16,
        ),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def foreign_flux(folder, guidance_embeds=True, dynamic=True):
    """A FLUX of another's making: a flow whose shift depends on the size, weights drawn at random."""
    torch.manual_seed(14)
    tokenizer = build_tokenizer(["zebra"], 20)
    second, config = small_t5(24)
    FluxPipeline(
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.3611, shift_factor=0.1159, sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 8, 2)),
        text_encoder_2=T5EncoderModel(config),
        tokenizer=tokenizer,
        tokenizer_2=second,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic, base_image_seq_len=16, max_image_seq_len=64,
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder

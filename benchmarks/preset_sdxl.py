"""SDXL base 1.0 as published (its config.json files), with random weights; tokenizers are the embedded model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Fill = Callable[[torch.nn.Module, torch.device, torch.dtype], None]


def sdxl(device: torch.device, dtype: torch.dtype, tokenizer: Any, fill: Fill) -> Any:
    """Builds the pipeline on the meta device and lets *fill* give its modules weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip_l = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
        num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
    )  # fmt: skip
    clip_g = CLIPTextConfig(
        vocab_size=49408, hidden_size=1280, intermediate_size=5120, projection_dim=1280,
        num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    )  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=1024,
            scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
        encoders = CLIPTextModel(clip_l), CLIPTextModelWithProjection(clip_g)
    for module in (unet, vae, *encoders):
        fill(module, device, dtype)
    tokenizer.model_max_length = 77
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        unet=unet, vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=tokenizer, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip

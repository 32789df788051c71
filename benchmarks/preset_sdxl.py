"""SDXL base 1.0 as published (its config.json files), with random weights; tokenizers are the embedded model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.preset_parts import autoencoder, clip_g, clip_l

Fill = Callable[[torch.nn.Module, torch.device, torch.dtype], None]


def sdxl(device: torch.device, dtype: torch.dtype, tokenizer: Any, fill: Fill) -> Any:
    """Builds the pipeline on the meta device and lets *fill* give its modules weights."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        vae = autoencoder(latent_channels=4, scaling_factor=0.13025, force_upcast=True)
        encoders = CLIPTextModel(clip_l()), CLIPTextModelWithProjection(clip_g())
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

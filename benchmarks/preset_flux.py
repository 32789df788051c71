"""FLUX.1 dev as published (its config.json files), with random weights; tokenizers are the embedded model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.preset_parts import autoencoder, clip_l, t5_xxl

Fill = Callable[[torch.nn.Module, torch.device, torch.dtype], None]


def flux(device: torch.device, dtype: torch.dtype, tokenizers: tuple[Any, Any], fill: Fill) -> Any:
    """Builds the pipeline on the meta device and lets *fill* give its modules weights.

    *tokenizers* are CLIP's and T5's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
        vae = autoencoder(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoders = CLIPTextModel(clip_l()), T5EncoderModel(t5_xxl())
    for module in (transformer, vae, *encoders):
        fill(module, device, dtype)
    for tokenizer, length in zip(tokenizers, (77, 512), strict=True):
        tokenizer.model_max_length = length
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
    )  # fmt: skip

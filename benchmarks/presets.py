"""The models that are measured: the embedded one, and the true shapes of others with random weights.

Speed does not depend on the weights' values, as long as they are random and of a natural size: nothing here can be
downloaded where the benchmarks run, and nothing has to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lora_server.config import ModelConfig
from lora_server.demo.paths import model_dir
from lora_server.models.base import ModelFamily
from lora_server.models.registry import family_of, load_model
from lora_server.models.settings import ModelSettings, read_settings

from benchmarks.preset_flux import flux
from benchmarks.preset_parts import autoencoder, clip_g, clip_l, t5_xxl
from benchmarks.preset_sdxl import sdxl

_STD = 0.02


@dataclass(frozen=True)
class Preset:
    """A model to measure.

    Attributes:
        name: Its name.
        sizes_px: Square sizes of its workloads.
        steps: Denoising steps of every request.
        guidance_scale: Over 1: two rows an image.
        pipeline: Builds the diffusers pipeline on a device, ready to run.
        settings: What the family takes its defaults from.
    """

    name: str
    sizes_px: tuple[int, ...]
    steps: int
    guidance_scale: float
    pipeline: Callable[[torch.device, torch.dtype], Any]
    settings: ModelSettings

    def family(self, config: ModelConfig) -> ModelFamily:
        """Loads the model as the server would."""
        if self.name == "demo":
            return load_model(config)
        pipeline = self.pipeline(torch.device("cuda"), torch.bfloat16)
        return family_of(pipeline, self.name, self.settings)


def _demo(device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(model_dir(), dtype=dtype, use_safetensors=True).to(device)


def sd35_medium(device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion 3.5 medium as published (model cards' config.json files), with random weights.

    The tokenizers are the embedded model's, padded to the true lengths: token ids are random to the model anyway.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            out_channels=16, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
        vae = autoencoder(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoders = [
            CLIPTextModelWithProjection(clip_l()),
            CLIPTextModelWithProjection(clip_g()),
            T5EncoderModel(t5_xxl()),
        ]
    for module in (transformer, vae, *encoders):
        _fill(module, device, dtype)
    demo = _demo(torch.device("cpu"), torch.float32)
    for tokenizer, length in ((demo.tokenizer, 77), (demo.tokenizer_2, 77), (demo.tokenizer_3, 512)):
        tokenizer.model_max_length = length
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=encoders[2],
        tokenizer=demo.tokenizer, tokenizer_2=demo.tokenizer_2, tokenizer_3=demo.tokenizer_3,
    )  # fmt: skip


def sdxl_base(device: torch.device, dtype: torch.dtype) -> Any:
    """SDXL base 1.0, with random weights; see `preset_sdxl`."""
    return sdxl(device, dtype, _demo(torch.device("cpu"), torch.float32).tokenizer, _fill)


def flux1_dev(device: torch.device, dtype: torch.dtype) -> Any:
    """FLUX.1 dev, with random weights; see `preset_flux`."""
    demo = _demo(torch.device("cpu"), torch.float32)
    return flux(device, dtype, (demo.tokenizer, demo.tokenizer_3), _fill)


@torch.no_grad()
def _fill(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a module built on the meta device random weights; norms keep theirs at 1."""
    module.to_empty(device=device)
    module.to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.shape[-1], device=device).expand(tensor.shape))
        elif "norm" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0.0, _STD, generator=generator)


PRESETS = {
    "flux1-dev-random": Preset(
        "flux1-dev-random", (512, 1024), 28, 3.5, flux1_dev, ModelSettings(width_px=1024, height_px=1024)
    ),
    "sdxl-random": Preset("sdxl-random", (512, 1024), 30, 5.0, sdxl_base, ModelSettings(width_px=1024, height_px=1024)),
    "demo": Preset("demo", (128,), 20, 4.0, _demo, read_settings(model_dir())),
    "sd35-medium-random": Preset(
        "sd35-medium-random", (512, 1024), 28, 4.5, sd35_medium, ModelSettings(width_px=1024, height_px=1024)
    ),
}

"""Tiny UNet models with random weights of the true classes: SD 1.5 (noise), SD 2.1 (velocity), SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lora_server.demo.paths import model_dir
from lora_server.types import GenerationParameters

from tests.factories import ATTENTION
from tests.parity.harness import Case, Subject

_TEXT_TOKENS = 20  # the embedded model's tokenizer, which these borrow
_VOCABULARY, _BOS, _EOS = 666, 664, 665
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""As a user of diffusers names them: class and what is changed."""


def _text_encoder(width: int, *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=_VOCABULARY, bos_token_id=_BOS, eos_token_id=_EOS, pad_token_id=_EOS, hidden_size=width,
        intermediate_size=32, projection_dim=width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=_TEXT_TOKENS, hidden_act="quick_gelu", initializer_factor=4.0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, sample_size=64,
    )  # fmt: skip


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**{
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4, **options,
    })  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)  # random networks amplify rounding, a quiet one less so
    return unet


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir() / "tokenizer")


def _build_sd(folder: Path, scheduler: Any, **unet: Any) -> str:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    encoder = _text_encoder(16, projection=False)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=encoder, tokenizer=_tokenizer(), unet=_unet(cross_attention_dim=16, **unet),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def _build_sd1(folder: Path) -> str:
    from diffusers import PNDMScheduler

    return _build_sd(folder, PNDMScheduler(skip_prk_steps=True, **_without_clip(_SCHEDULE)))


def _build_sd2(folder: Path) -> str:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=False, **_SCHEDULE)
    return _build_sd(folder, scheduler, use_linear_projection=True, attention_head_dim=(2, 4))


def build_sdxl(folder: Path, second_width: int = 16) -> str:
    """Saves a tiny SDXL; in one file, the text encoders must differ in width."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    unet = _unet(
        cross_attention_dim=16 + second_width, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(2, 2),
        projection_class_embeddings_input_dim=6 * 8 + second_width,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(), text_encoder=_text_encoder(16, projection=False), tokenizer=_tokenizer(),
        text_encoder_2=_text_encoder(second_width, projection=True), tokenizer_2=_tokenizer(), unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_without_clip(_SCHEDULE)),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def _without_clip(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "clip_sample"}


def _load(class_name: str, options: dict[str, Any]) -> Any:
    def load(model: str, dtype: torch.dtype) -> Any:
        import diffusers

        return getattr(diffusers, class_name).from_pretrained(model, dtype=dtype, use_safetensors=True, **options)

    return load


def _prepare(pipeline: Any, wanted: GenerationParameters) -> None:
    import diffusers

    if wanted.scheduler is not None:
        class_name, changes = SCHEDULERS[wanted.scheduler]
        pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **changes)


def _adapters(strength: float, *text_encoders: str) -> dict[str, dict[str, tuple[float, dict[str, Any]]]]:
    convolutions = ["conv1", "conv_in", "conv_shortcut", "downsamplers.0.conv", "to_q"]
    return {
        "a": {"unet": (0.05 * strength, {"target_modules": ATTENTION})},
        "b": {"unet": (0.1 * strength, {"target_modules": ["ff.net.0.proj", "proj_in"], "r": 6, "use_rslora": True})},
        "conv": {"unet": (0.05 * strength, {"target_modules": convolutions})},
        "text": {
            "unet": (0.1 * strength, {"target_modules": ["to_v"]}),
            **{each: (0.3, {"target_modules": ["q_proj", "fc1"]}) for each in text_encoders},
        },
    }


_OWN: dict[str, Case] = {
    "negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 88}, []),
    "convolutions": ({}, [("conv", 1.0)]),
    "convolutions with another": ({"num_images": 3}, [("conv", -0.6), ("a", 1.0)]),
}
_MIXED: tuple[Case, ...] = (
    ({"seed": 6, "scheduler": "euler_ancestral"}, [("conv", 0.7)]),
    ({"seed": 7, "scheduler": "dpmpp_2m", "num_inference_steps": 5}, [("a", 1.0)]),
    ({"seed": 8, "scheduler": "ddim", "num_images": 2}, [("conv", 1.0), ("a", -0.5)]),
)

SD1 = Subject(
    name="sd1",
    build=_build_sd1,
    pipeline=_load("StableDiffusionPipeline", {"safety_checker": None}),
    denoiser="unet",
    adapters=_adapters(4, "text_encoder"),
    side_px=64,
    latent=(4, 4),
    guidance_scale=2.0,
    prepare=_prepare,
    cases=_OWN,
    schedulers=tuple(SCHEDULERS),
    mixed=_MIXED,
)
SD2 = Subject(
    name="sd2",
    build=_build_sd2,
    pipeline=_load("StableDiffusionPipeline", {"safety_checker": None}),
    denoiser="unet",
    adapters=_adapters(4, "text_encoder"),
    side_px=64,
    latent=(4, 4),
    guidance_scale=2.0,
    prepare=_prepare,
    common=("base", "one adapter", "text encoder with another"),
    schedulers=("euler", "dpmpp_2m", "pndm"),
)
SDXL = Subject(
    name="sdxl",
    build=build_sdxl,
    pipeline=_load("StableDiffusionXLPipeline", {"add_watermarker": False}),
    denoiser="unet",
    adapters=_adapters(1, "text_encoder", "text_encoder_2"),
    side_px=64,
    latent=(4, 4),
    guidance_scale=2.0,
    prepare=_prepare,
    cases=_OWN,
    schedulers=("ddim", "euler_ancestral", "dpmpp_2m"),
    mixed=_MIXED,
)

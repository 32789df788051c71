"""FLUX.1 dev and schnell, Qwen-Image and Z-Image as subjects: tiny networks of the true classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lora_server.models.flow_family import pack
from lora_server.types import GenerationParameters

from tests.factories import ATTENTION
from tests.parity import tiny_flow
from tests.parity.harness import Case, Subject

_LONG = "a small green moon over forty-two hills at night"
_FLIPS = 0.0002
"""Two of the 12,288 values of these pictures."""
_CASES: dict[str, Case] = {
    "negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 112}, []),
    "a text of another length": ({"prompt": _LONG, "negative_prompt": "a blue ring", "seed": 3}, [("b", 0.5)]),
}
_MIXED: tuple[Case, ...] = (({"seed": 7, "prompt": _LONG}, [("b", 0.5)]),)


def _build(write: Callable[[Path], Path], settings: str = "{}") -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        write(folder)
        (folder / "lora_inference.json").write_text(settings)
        return str(folder)

    return build


def _pipeline(model: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, dtype=dtype)


def _noise_as(form: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, GenerationParameters], None]:
    """Lets a pipeline take its noise as images, (B, C, H, W), which *form* then makes into what it steps."""

    def prepare(pipeline: Any, _: GenerationParameters) -> None:
        own = pipeline.prepare_latents
        pipeline.prepare_latents = lambda *given: own(*given[:-1], form(given[-1]))

    return prepare


def _flux_options(wanted: GenerationParameters) -> dict[str, Any]:
    true = {"negative_prompt": wanted.negative_prompt, "true_cfg_scale": wanted.true_cfg_scale}
    return {"max_sequence_length": 40, **true}


def _qwen_options(wanted: GenerationParameters) -> dict[str, Any]:
    true = {"negative_prompt": wanted.negative_prompt, "true_cfg_scale": wanted.guidance_scale}
    return {"guidance_scale": None, **true}


def _bounded(_: GenerationParameters) -> dict[str, Any]:
    return {"cfg_truncation": 0.3, "cfg_normalization": 0.9}


FLUX = Subject(
    name="flux",
    build=_build(tiny_flow.build_flux, '{"max_sequence_length": 40}'),
    pipeline=_pipeline,
    denoiser="transformer",
    adapters={
        "a": {"transformer": (0.15, {"target_modules": [*ATTENTION, "add_q_proj"]})},
        "b": {
            "transformer": (
                0.15,
                {
                    "target_modules": ["ff.net.0.proj", "proj_mlp", "single_transformer_blocks.0.proj_out"],
                    "r": 6,
                    "use_rslora": True,
                },
            )
        },
        "text": {
            "transformer": (0.1, {"target_modules": ["to_v"]}),
            "text_encoder": (0.4, {"target_modules": ["q_proj", "fc1"]}),
            "text_encoder_2": (0.4, {"target_modules": ["q", "wo"]}),
        },
    },
    side_px=64,
    latent=(4, 8),
    flips=_FLIPS,
    options=_flux_options,
    prepare=_noise_as(pack),
    cases={
        "true guidance, negative prompt, wide": (
            {"true_cfg_scale": 2.0, "negative_prompt": "a blue ring", "width_px": 112},
            [("a", 1.0)],
        ),
    },
    mixed=(({"seed": 7, "true_cfg_scale": 2.5, "negative_prompt": "a ring"}, [("b", 0.5)]), *_MIXED),
)
SCHNELL = Subject(
    name="schnell",
    build=_build(lambda folder: tiny_flow.build_flux(folder, guidance_embeds=False), '{"max_sequence_length": 40}'),
    pipeline=_pipeline,
    denoiser="transformer",
    adapters=FLUX.adapters,
    side_px=64,
    latent=(4, 8),
    flips=_FLIPS,
    options=_flux_options,
    prepare=_noise_as(pack),
)
QWEN_IMAGE = Subject(
    name="qwen-image",
    build=_build(tiny_flow.build_qwen_image),
    pipeline=_pipeline,
    denoiser="transformer",
    adapters={
        "a": {"transformer": (0.15, {"target_modules": [*ATTENTION, "add_k_proj", "img_mod.1"]})},
        "b": {
            "transformer": (
                0.15,
                {"target_modules": ["img_mlp.net.0.proj", "txt_mlp.net.2", "txt_in"], "r": 6, "use_rslora": True},
            )
        },
        "text": {
            "transformer": (0.1, {"target_modules": ["to_v"]}),
            "text_encoder": (0.4, {"target_modules": ["q_proj", "down_proj"]}),
        },
    },
    side_px=64,
    latent=(4, 8),
    flips=_FLIPS,
    options=_qwen_options,
    prepare=_noise_as(pack),
    cases=_CASES,
    mixed=_MIXED,
)
Z_IMAGE = Subject(
    name="z-image",
    build=_build(tiny_flow.build_z_image),
    pipeline=_pipeline,
    denoiser="transformer",
    adapters={
        "a": {"transformer": (0.15, {"target_modules": ATTENTION})},
        "b": {
            "transformer": (
                0.15,
                {
                    "target_modules": ["feed_forward.w1", "feed_forward.w2", "cap_embedder.1"],
                    "r": 6,
                    "use_rslora": True,
                },
            )
        },
        "text": {
            "transformer": (0.1, {"target_modules": ["to_v"]}),
            "text_encoder": (0.4, {"target_modules": ["q_proj", "down_proj"]}),
        },
    },
    side_px=64,
    latent=(4, 8),
    flips=_FLIPS,
    guidance_scale=0.8,
    prepare=_noise_as(torch.Tensor.float),
    cases={**_CASES, "guidance off": ({"guidance_scale": 0.0}, [("a", 1.0)])},
    mixed=(({"seed": 8, "guidance_scale": 0.0}, [("a", -0.5)]), *_MIXED),
)
BOUNDED_Z_IMAGE = Subject(
    name="z-image with bounded guidance",
    build=_build(tiny_flow.build_z_image, '{"cfg_truncation": 0.3, "cfg_normalization": 0.9}'),
    pipeline=_pipeline,
    denoiser="transformer",
    adapters=Z_IMAGE.adapters,
    side_px=64,
    latent=(4, 8),
    flips=_FLIPS,
    guidance_scale=0.8,
    options=_bounded,
    prepare=_noise_as(torch.Tensor.float),
)

"""The embedded model as a subject: SD3."""

from __future__ import annotations

from typing import Any

import torch
from lora_server.demo.paths import model_dir
from lora_server.types import GenerationParameters, SkipLayerGuidance

from tests.factories import ATTENTION
from tests.parity.harness import Subject


def _pipeline(model: str, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(model_dir(), dtype=dtype, use_safetensors=True)


def _options(wanted: GenerationParameters) -> dict[str, Any]:
    guidance = wanted.skip_layer_guidance
    found: dict[str, Any] = {"max_sequence_length": 20}
    if guidance is not None:
        found |= {
            "skip_guidance_layers": list(guidance.layers),
            "skip_layer_guidance_scale": guidance.scale,
            "skip_layer_guidance_start": guidance.start,
            "skip_layer_guidance_stop": guidance.stop,
        }
    return found


SD3 = Subject(
    name="sd3",
    build=lambda folder: "demo",
    pipeline=_pipeline,
    denoiser="transformer",
    adapters={
        "a": {"transformer": (0.05, {"target_modules": ATTENTION})},
        "b": {"transformer": (0.05, {"target_modules": ["ff.net.0.proj"], "r": 6, "use_rslora": True})},
        "text": {
            "transformer": (0.05, {"target_modules": ["to_v"]}),
            "text_encoder": (0.2, {"target_modules": ["q_proj", "fc1"]}),
        },
    },
    side_px=128,
    latent=(16, 8),
    options=_options,
    cases={
        "negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 192}, []),
        "skip-layer guidance": ({"skip_layer_guidance": SkipLayerGuidance((1, 2), stop=0.9)}, []),
    },
    mixed=(({"seed": 6, "skip_layer_guidance": SkipLayerGuidance((2,), stop=0.9)}, [("a", -0.5)]),),
)

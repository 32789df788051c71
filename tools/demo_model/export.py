"""Writes the trained parts as a diffusers folder and as PEFT folders, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from lora_server.demo.paths import adapters_dir, model_dir
from peft import PeftModel

from tools.demo_model.architecture import Conditioner, build_scheduler
from tools.demo_model.scenes import SIDE_PX
from tools.demo_model.tokenizers import MAX_TOKENS

BASE_MODEL_NAME = "lora-inference/demo"
SETTINGS = {
    "width_px": SIDE_PX,
    "height_px": SIDE_PX,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "max_sequence_length": MAX_TOKENS,
}


def export_model(
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    conditioner: Conditioner,
    folder: Path | None = None,
) -> Path:
    """Writes the pipeline's folder, by default into the package; returns it."""
    folder = folder or model_dir()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=conditioner.encoders[0],
        tokenizer=conditioner.tokenizers[0],
        text_encoder_2=conditioner.encoders[1],
        tokenizer_2=conditioner.tokenizers[1],
        text_encoder_3=conditioner.encoders[2],
        tokenizer_3=conditioner.tokenizers[2],
    )
    pipeline.to("cpu", torch.bfloat16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder)
    (folder / "lora_inference.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    return folder


def export_adapter(
    name: str, transformer: PeftModel, text_encoder: PeftModel | None, folder: Path | None = None
) -> Path:
    """Writes one adapter: the transformer's PEFT folder, with `text_encoder/` inside if there is one; returns it."""
    folder = (folder or adapters_dir()) / name
    _save(transformer, folder)
    if text_encoder is not None:
        _save(text_encoder, folder / "text_encoder")
    return folder


def _forget_origin(folder: Path) -> None:
    """Removes `_name_or_path`, the place on the training machine that a part was loaded from."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def _save(model: PeftModel, folder: Path) -> None:
    model.to("cpu", torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL_NAME
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card, with nothing in it

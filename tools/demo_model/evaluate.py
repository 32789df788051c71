"""Measures the shipped model and adapters on held-out prompts and seeds, and draws the contact sheet.

python -m tools.demo_model.evaluate --samples 500        # minutes on a GPU, about a quarter of an hour on two cores
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from lora_server.demo.paths import adapters_dir, model_dir
from peft import PeftModel
from PIL import Image, ImageDraw

from tools.demo_model.judge import judge_pictures, load_judge, summarise
from tools.demo_model.render import LOOKS
from tools.demo_model.scenes import Scene, sample_scene
from tools.demo_model.training import pick_device

FIRST_HELD_OUT_SEED = 1_000_000


def main() -> None:
    """Prints and writes, for the base model and each adapter: shape, colour, whole picture, look."""
    arguments = _arguments()
    device = pick_device()
    rng = random.Random(2024)
    scenes = [sample_scene(rng, held_out=True) for _ in range(arguments.samples)]
    judge = load_judge(device)
    results, sheets = {}, {}
    for look in LOOKS:
        if look != "plain" and not (arguments.adapters / look).is_dir():
            continue
        pictures = draw(arguments, look, scenes, device)
        results[look] = summarise(judge_pictures(judge, pictures, scenes), look)
        sheets[look] = pictures[:10].cpu()
        print(f"{look}: {results[look]}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(
        json.dumps({"samples": arguments.samples, **results}, indent=2) + "\n"
    )
    contact_sheet(sheets).save(arguments.out / "demo-looks.png")


@torch.no_grad()
def draw(arguments: argparse.Namespace, look: str, scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """Draws every scene's caption with diffusers and peft, with the look's adapter; returns (B, 3, H, W) in 0..1."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(arguments.model, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    folder = arguments.adapters / look
    if look != "plain":
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder).merge_and_unload()
        if (folder / "text_encoder").is_dir():
            adapted = PeftModel.from_pretrained(pipeline.text_encoder, folder / "text_encoder")
            pipeline.text_encoder = adapted.merge_and_unload()
    settings = json.loads((arguments.model / "lora_inference.json").read_text())
    parts = []
    for start in range(0, len(scenes), arguments.batch):
        prompts = [scene.caption for scene in scenes[start : start + arguments.batch]]
        seeds = [FIRST_HELD_OUT_SEED + start + k for k in range(len(prompts))]
        output = pipeline(
            prompts,
            height=settings["height_px"],
            width=settings["width_px"],
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            max_sequence_length=settings["max_sequence_length"],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        parts.append(output.images)
    return torch.cat(parts)


def contact_sheet(rows: dict[str, torch.Tensor]) -> Image.Image:
    """Lays out rows of pictures, each (N, 3, H, W) in 0..1, with their names at the left."""
    label_px, height, width = 96, 128, 128
    columns = max(len(row) for row in rows.values())
    sheet = Image.new("RGB", (label_px + columns * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, y * height + height // 2), name, fill="black")
        for x, picture in enumerate(pictures):
            pixels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().numpy().astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (label_px + x * width, y * height))
    return sheet


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--adapters", type=Path, default=adapters_dir())
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

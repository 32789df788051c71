"""Trains the LoRA adapters with PEFT on top of the base model: one a look, on the same captions.

python -m tools.demo_model.train_adapters --minutes 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from lora_server.demo.paths import adapters_dir, model_dir
from peft import LoraConfig, get_peft_model

from tools.demo_model.architecture import Conditioner
from tools.demo_model.export import export_adapter
from tools.demo_model.flow import LatentStock, flow_loss
from tools.demo_model.pictures import Studio
from tools.demo_model.training import Plan, load_averaged, pick_device, train

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
CONFIGS = {
    "neon": LoraConfig(r=8, lora_alpha=8, target_modules=[*ATTENTION, *FEED_FORWARD]),
    "hatching": LoraConfig(r=16, lora_alpha=32, target_modules=[*ATTENTION, *FEED_FORWARD]),
    "pixel-art": LoraConfig(r=16, lora_alpha=16, target_modules=[*ATTENTION, *FEED_FORWARD], use_rslora=True),
    "watercolour": LoraConfig(r=12, lora_alpha=24, target_modules=[*ATTENTION, *FEED_FORWARD]),
}
TEXT_ENCODER_CONFIGS = {"watercolour": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"])}


def main(argv: list[str] | None = None) -> None:
    """Trains each adapter for the given minutes and exports it as PEFT folders."""
    arguments = _arguments(argv)
    device = pick_device()
    for look in arguments.looks:
        torch.manual_seed(0)
        _train_one(look, arguments, device)


def _train_one(look: str, arguments: argparse.Namespace, device: torch.device) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(arguments.model, torch_dtype=torch.float32).to(device)
    encoders = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3])
    for module in (pipeline.vae, pipeline.transformer, encoders):
        module.requires_grad_(False)
    conditioner = Conditioner((pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3), encoders)
    stock = LatentStock(Studio(arguments.scenes, device, seed=77), look, pipeline.vae, conditioner)
    transformer = get_peft_model(pipeline.transformer, CONFIGS[look])
    text_encoder = None
    if look in TEXT_ENCODER_CONFIGS:
        text_encoder = get_peft_model(pipeline.text_encoder, TEXT_ENCODER_CONFIGS[look])
        encoders[0] = text_encoder
    modules = [transformer, *([text_encoder] if text_encoder is not None else [])]
    plan = Plan(arguments.minutes, arguments.rate, ema_decay=0.99)
    # Compiling takes as long as a third of the training; a captured eager step is fast enough here.
    loss = flow_loss(stock, transformer, conditioner, arguments.batch, compile_model=False)
    load_averaged(modules, train(loss, modules, plan, look))
    export_adapter(look, transformer, text_encoder, arguments.out)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each adapter")
    parser.add_argument("--looks", nargs="+", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--out", type=Path, default=adapters_dir())
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

"""Trains the denoiser and its text encoders on plain pictures; resumes from a checkpoint of an earlier run.

python -m tools.demo_model.train_base --minutes 9 --begin 0 --end 0.5
python -m tools.demo_model.train_base --minutes 9 --begin 0.5 --end 1 --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tools.demo_model.architecture import Conditioner, build_transformer
from tools.demo_model.export import export_model
from tools.demo_model.flow import LatentStock, flow_loss
from tools.demo_model.pictures import Studio
from tools.demo_model.training import WORK_FOLDER, Plan, load_averaged, pick_device, train

CHECKPOINT = "base.pt"


def main(argv: list[str] | None = None) -> None:
    """Trains, saves a checkpoint to resume from, and exports the averaged weights as a diffusers folder."""
    arguments = _arguments(argv)
    device = pick_device()
    torch.manual_seed(int(arguments.begin * 1000))
    vae = AutoencoderKL.from_pretrained(arguments.work / "vae").to(device).eval().requires_grad_(False)
    transformer, conditioner = build_transformer().to(device), Conditioner.build()
    conditioner.encoders.to(device)
    modules = [transformer, conditioner.encoders]
    if arguments.resume:
        for module, state in zip(modules, torch.load(arguments.work / CHECKPOINT, map_location=device), strict=True):
            module.load_state_dict(state)
    stock = LatentStock(
        Studio(arguments.scenes, device, seed=int(arguments.begin * 1000) + 10), "plain", vae, conditioner
    )
    plan = Plan(arguments.minutes, arguments.rate, arguments.begin, arguments.end, ema_decay=arguments.ema_decay)
    averaged = train(flow_loss(stock, transformer, conditioner, arguments.batch), modules, plan, "base")
    load_averaged(modules, averaged)
    arguments.out.mkdir(parents=True, exist_ok=True)
    states = [{name: value.to(torch.bfloat16) for name, value in m.state_dict().items()} for m in modules]
    torch.save(states, arguments.out / CHECKPOINT)
    export_model(vae, transformer, conditioner, arguments.out / "model")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--begin", type=float, default=0.0)
    parser.add_argument("--end", type=float, default=1.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=300_000)
    parser.add_argument("--work", type=Path, default=Path(WORK_FOLDER), help="holds vae/ and the checkpoint")
    parser.add_argument("--out", type=Path, default=Path(WORK_FOLDER), help="receives the checkpoint and model/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

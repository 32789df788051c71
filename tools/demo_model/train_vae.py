"""Trains the autoencoder on pictures of every look, so that it can decode what the adapters will draw.

python -m tools.demo_model.train_vae --minutes 2.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from tools.demo_model.architecture import build_vae
from tools.demo_model.pictures import Studio
from tools.demo_model.render import LOOKS
from tools.demo_model.training import WORK_FOLDER, Plan, load_averaged, pick_device, train

KL_WEIGHT = 1e-4


def main(argv: list[str] | None = None) -> None:
    """Trains, reports PSNR for each look on held-out scenes, and saves `vae/` with its latents' scale and shift."""
    arguments = _arguments(argv)
    device = pick_device()
    torch.manual_seed(0)
    vae = (AutoencoderKL.from_pretrained(arguments.out / "vae") if arguments.resume else build_vae()).to(device)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    studio = Studio(arguments.scenes, device, seed=1)

    def loss() -> Tensor:
        index = torch.randint(len(studio), (arguments.batch,), device=device)
        with torch.no_grad():
            pictures = studio.paint_mixed(index) * 2 - 1
        return _loss(vae, pictures)

    averaged = train(loss, [vae], Plan(arguments.minutes, arguments.rate, ema_decay=0.995), "vae")
    load_averaged([vae], averaged)
    _report(vae, Studio(min(256, arguments.scenes), device, seed=2, held_out=True))
    _set_scale(vae, studio)
    vae.save_pretrained(arguments.out / "vae")


def _loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.device.type == "cuda"):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded = decoded.float()
    error = decoded - pictures
    edges = sum(functional.l1_loss(torch.diff(decoded, dim=axis), torch.diff(pictures, dim=axis)) for axis in (-1, -2))
    return error.abs().mean() + error.square().mean() + 0.5 * edges + KL_WEIGHT * posterior.kl().float().mean() / 4096


@torch.no_grad()
def _report(vae: AutoencoderKL, studio: Studio) -> None:
    for look in LOOKS:
        pictures = studio.paint(torch.arange(len(studio), device=vae.device), look)
        decoded = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        error = (decoded.clamp(0, 1) - pictures).square().mean(dim=(1, 2, 3))
        print(f"vae: {look}: PSNR {(-10 * error.log10()).mean():.1f} dB", flush=True)


@torch.no_grad()
def _set_scale(vae: AutoencoderKL, studio: Studio) -> None:
    """Makes (latents - shift) * scale have mean 0 and deviation 1 on plain pictures."""
    pictures = studio.paint(torch.arange(min(1024, len(studio)), device=vae.device), "plain")
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(128)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    print(f"vae: latents {float(latents.mean()):.3f} +- {float(latents.std()):.3f}", flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--resume", action="store_true", help="go on from the vae/ that is there")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=Path(WORK_FOLDER))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

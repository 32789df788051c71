"""The rectified-flow objective on stored latents, shared by the base model's and the adapters' training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from tools.demo_model.architecture import Conditioner
from tools.demo_model.pictures import Studio

EMPTY_SHARE = 0.1


class LatentStock:
    """Latents of painted scenes and the token ids of their captions, all on the device.

    Attributes:
        latents: (N, 16, 16, 16) bfloat16, scaled to deviation 1.
        token_ids: (N, 3, T).
        empty_ids: (3, T), of the empty caption.
    """

    @torch.no_grad()
    def __init__(self, studio: Studio, look: str, vae: AutoencoderKL, conditioner: Conditioner) -> None:
        device = vae.device
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor
        parts = []
        for index in torch.arange(len(studio), device=device).split(512):
            with torch.autocast(device.type, torch.bfloat16):
                latents = vae.encode(studio.paint(index, look) * 2 - 1).latent_dist.mode().float()
            parts.append(((latents - shift) * scale).to(torch.bfloat16).contiguous())
        self.latents = torch.cat(parts)
        captions = [scene.caption for scene in studio.scenes]
        ids = [conditioner.token_ids(captions[start : start + 20_000]) for start in range(0, len(captions), 20_000)]
        self.token_ids = torch.cat(ids).to(device)
        self.empty_ids = conditioner.token_ids([""])[0].to(device)


def flow_loss(
    stock: LatentStock, transformer: Any, conditioner: Conditioner, batch: int, *, compile_model: bool = True
) -> Callable[[], Tensor]:
    """Returns a function that draws a batch and returns its loss.

    Esser et al. 2024 (SD3), eq. 13 and 19: x_t = (1 - t) x + t noise, target noise - x, t logit-normal.
    """
    device = stock.latents.device

    if compile_model and device.type == "cuda":
        for block in transformer.transformer_blocks:  # three kinds of blocks: faster to compile than the whole
            block.compile()

    def loss() -> Tensor:
        index = torch.randint(len(stock.latents), (batch,), device=device)
        clean = stock.latents[index].float()
        noise = torch.randn_like(clean)
        time = torch.sigmoid(torch.randn(batch, device=device) + 0.3)
        share = time[:, None, None, None]
        empty = torch.rand(batch, device=device) < EMPTY_SHARE
        ids = torch.where(empty[:, None, None], stock.empty_ids, stock.token_ids[index])
        with torch.autocast(device.type, torch.bfloat16):
            tokens, pooled = conditioner(ids)
            velocity = transformer(
                hidden_states=(1 - share) * clean + share * noise,
                timestep=time * 1000,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return functional.mse_loss(velocity.float(), noise - clean)

    return loss

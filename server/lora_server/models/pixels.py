"""From what an autoencoder gave to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_pixels(image: Tensor) -> Tensor:
    """Rounds a decoded image, (B, 3, height_px, width_px) from -1 to 1, to (B, height_px, width_px, 3) uint8.

    What is uint8 already stays as it is. NaN has no pixel: whoever calls this has asked for it before (`finite`).
    """
    if image.dtype != torch.uint8:
        image = (image / 2 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).contiguous()

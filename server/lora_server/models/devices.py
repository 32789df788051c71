"""Which device and which type of numbers a model gets."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """Resolves `auto` (CUDA if there is one), `cpu` or `cuda` (the current CUDA device).

    Raises:
        RuntimeError: If CUDA is asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolves `auto` (bfloat16 on CUDA, float32 on the CPU) or the name of a floating type."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype

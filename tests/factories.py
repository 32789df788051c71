"""Builders for tests: small real models and adapters written by peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class TinyNet(torch.nn.Module):
    """A stand-in for a component: linears under dotted names, and a convolution that strides over an edge."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 6), "to_k": torch.nn.Linear(6, 8)})
        self.blocks = torch.nn.ModuleList([block, torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 6)})])
        self.conv = torch.nn.Conv2d(3, 5, (3, 2), stride=2, padding=1)


def write_adapter(folder: Path, model: torch.nn.Module, seed: int = 0, amount: float = 0.3, **config: Any) -> Path:
    """Wraps *model* with peft, fills both halves with random numbers, and saves it with peft's own writer."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **config}
    wrapped = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * amount)
    wrapped.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    return folder

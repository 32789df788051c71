"""The first linear of a feed-forward with its GELU as the epilogue of the product.

On CUDA that saves writing and reading the widest tensor of a block: 13% of the two operations at the shapes of SD3.5
(measured by benchmarks/kernels.py, see docs/performance.md). Elsewhere it is what diffusers computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_server.models.lora_linear import LoraLinear


class FusedGelu(nn.Module):
    """Stands for diffusers' `GELU` with the tanh approximation; its linear keeps its path, `proj`."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns gelu(proj(x)), (B, T, 4 C) for (B, T, C)."""
        proj = self.proj
        if hidden_states.device.type != "cuda" or not isinstance(proj, LoraLinear) or proj.bias is None:
            return functional.gelu(proj(hidden_states), approximate="tanh")
        x, weight = proj.operands(hidden_states)
        # What torch.compile does not fuse: the epilogue of cuBLASLt, reached by this operator alone.
        product = torch._addmm_activation(proj.bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        result: Tensor = product.unflatten(0, x.shape[:-1])
        return result


def fuse_gelus(root: nn.Module) -> None:
    """Replaces every tanh-approximated GELU of diffusers' feed-forwards under *root*."""
    from diffusers.models.activations import GELU

    found: list[tuple[str, Any]] = [(path, m) for path, m in root.named_modules() if isinstance(m, GELU)]
    for path, module in found:
        if module.approximate == "tanh":
            root.set_submodule(path, FusedGelu(module.proj))

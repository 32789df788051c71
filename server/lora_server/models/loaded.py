"""What is checked of a pipeline once it is loaded: that every weight is there, and is a number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch


def check_numbers(pipeline: Any) -> None:
    """Refuses weights without memory, and values that are not finite; reads everything once, where it lies.

    Raises:
        ValueError: With the component and the tensor.
    """
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            _check_module(component, module)


def _check_module(component: str, module: torch.nn.Module) -> None:
    tensors = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"the weights of {component} lack {name}")
    for name, largest in _magnitudes(tensors):
        if not math.isfinite(largest):
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ValueError(f"the tensor {name} of {component} has values that are not finite in {dtype}")


def _magnitudes(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """The largest magnitude of each tensor, NaN if any value is; one pass over it, one wait for all."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if floats:
        largest = torch._foreach_norm(list(floats.values()), ord=math.inf)
        yield from zip(floats, torch.stack([each.double() for each in largest]).tolist(), strict=True)

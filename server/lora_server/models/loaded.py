"""What is checked of a pipeline once it is loaded: that every weight is there, and is a number."""

from __future__ import annotations

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
    for name, is_finite in _finite(tensors).items():
        if not is_finite:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ValueError(f"the tensor {name} of {component} has values that are not finite in {dtype}")


def _finite(tensors: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Whether all values of each tensor are: extremes pass NaN on, and are quicker than a mask. One wait for all."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return {}
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).double() for tensor in floats.values()])
    return dict(zip(floats, extremes.isfinite().all(dim=1).tolist(), strict=True))

"""Which of torch's attention kernels a model's shapes run fastest on: measured, as it depends on card and shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_TIMED_RUNS = 3


class AttentionMeter(TorchFunctionMode):
    """Within it, every attention of torch runs with each of the *candidates*, and their times are added up.

    What is returned comes from the kernel that would have run anyway. Attentions of equal shapes are timed once.
    """

    def __init__(self, candidates: Sequence[SDPBackend]) -> None:
        super().__init__()
        self._total_s = dict.fromkeys(candidates, 0.0)
        self._known: dict[object, dict[SDPBackend, float]] = {}

    @property
    def fastest_first(self) -> list[SDPBackend]:
        """The candidates by the time that they took; one that cannot run some shape is last."""
        return sorted(self._total_s, key=lambda backend: self._total_s[backend])

    @property
    def milliseconds(self) -> dict[str, float]:
        """What each candidate took in all, by its name; infinity if it cannot run."""
        return {backend.name: round(seconds * 1e3, 3) for backend, seconds in self._total_s.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self._add(lambda: func(*args, **kwargs), _key(args, kwargs), args[0].device)
        return func(*args, **kwargs)

    def _add(self, attention: Callable[[], Tensor], key: object, device: torch.device) -> None:
        if key not in self._known:
            self._known[key] = {backend: _seconds(attention, backend, device) for backend in self._total_s}
        for backend, seconds in self._known[key].items():
            self._total_s[backend] += seconds


def _key(args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """What the time depends on: shapes, strides and types of tensors, and the other arguments."""
    parts = [*enumerate(args), *sorted(kwargs.items())]
    return tuple(
        (name, tuple(part.shape), part.stride(), part.dtype) if isinstance(part, Tensor) else (name, part)
        for name, part in parts
    )


def _seconds(attention: Callable[[], Tensor], backend: SDPBackend, device: torch.device) -> float:
    """The least of a few runs after one that does not count; infinity if the kernel does not take these arguments."""
    try:
        with sdpa_kernel(backend):
            attention()
            return min(_timed(attention, device) for _ in range(_TIMED_RUNS))
    except RuntimeError:
        return float("inf")


def _timed(action: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        action()
        return time.perf_counter() - began_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3

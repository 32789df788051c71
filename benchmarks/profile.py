"""Where the time of a step goes, by kind of kernel: what bounds a figure that misses its bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_RUNS = 3
_MOST_KERNELS = 14

KINDS = (
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk")),
    ("norms and elementwise, compiled", ("triton",)),
    ("copies", ("memcpy", "copy", "memset", "cat")),
)
"""Kinds of kernels by parts of their names, the first that fits."""


def by_kind(action: Callable[[], object]) -> dict[str, Any]:
    """Runs *action* a few times under the profiler; returns ms a run by kind of kernel, and the longest kernels.

    *action* must have run before and must wait for the device. Empty without CUDA.
    """
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_RUNS):
            action()
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3 / _RUNS
        if ms:
            kinds[_kind(event.key)] += ms  # type: ignore[assignment]
            kernels[f"{event.key[:70]} x{event.count // _RUNS}"] += ms  # type: ignore[assignment]
    longest = {name: round(ms, 3) for name, ms in kernels.most_common(_MOST_KERNELS)}
    return {"ms_by_kind": {kind: round(ms, 3) for kind, ms in kinds.most_common()}, "longest_ms": longest}


def _kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")

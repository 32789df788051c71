"""Medians of repeated runs, timed by the device where there is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_s(action: Callable[[], object], device: torch.device, *, runs: int = 20, warm: int = 3) -> float:
    """Seconds of one run on the device; on the CPU by the clock."""
    for _ in range(warm):
        action()
    if device.type != "cuda":
        return statistics.median(_clocked_s(action) for _ in range(min(runs, 3)))
    seconds = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def graphed(action: Callable[[], object]) -> Callable[[], object]:
    """Captures *action* into a CUDA graph, so that launches do not count."""
    for _ in range(3):
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def _clocked_s(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s

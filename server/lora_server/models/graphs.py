"""CUDA graphs: capturing work that will be replayed, and modules that replay themselves at declared shapes.

A graph has its tensors at fixed addresses: what goes in is copied there, what comes out is copied away. Engine thread
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_WARM_RUNS = 3

T = TypeVar("T")


def capture_graph(action: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """Runs *action* a few times on a stream of its own, then captures it; returns the graph and its static output.

    Blocks until the device is idle. Other threads may go on using the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_RUNS):
            action()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = action()
    return graph, output


class GraphedModule:
    """Takes the place of a module's forward pass: compiled and replayed at captured shapes, as it was at all others.

    For modules of one tensor in and one out that treat the items of a batch alike, such as the decoder of an
    autoencoder. Items go through one by one: at the shapes in question one item fills the device.
    """

    def __init__(self, module: nn.Module) -> None:
        """Replaces the forward pass of *module*, which must be on CUDA."""
        self._plain = module.forward
        self._compiled = torch.compile(module.forward, dynamic=False)
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._capturing = False
        self._pool = torch.cuda.graph_pool_handle()
        module.forward = self

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what the module makes of *x*, (B, ...)."""
        if args or any(value is not None for value in kwargs.values()):
            return self._without_graph(x, *args, **kwargs)
        shape = tuple(x.shape[1:])
        if self._capturing and shape not in self._graphs:
            self._capture(x[:1])
        captured = self._graphs.get(shape)
        if captured is None:
            return self._without_graph(x)
        graph, static, output = captured
        items = []
        for item in x.split(1):
            static.copy_(item)
            graph.replay()
            items.append(output.clone())
        return torch.cat(items)

    def _without_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self._plain(x, *args, **kwargs)
        return output

    def capture(self, action: Callable[[], object]) -> None:
        """Runs *action*; the shapes that the module meets in it are captured, which takes seconds each."""
        self._capturing = True
        try:
            action()
        finally:
            self._capturing = False

    def _capture(self, sample: Tensor) -> None:
        static = sample.clone()
        graph, output = capture_graph(lambda: self._compiled(static), self._pool)
        self._graphs[tuple(sample.shape[1:])] = graph, static, output

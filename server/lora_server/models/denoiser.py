"""Runs the denoising network: eagerly on the CPU; on CUDA with compiled blocks, replayed from CUDA graphs.

A graph is captured for a bucket: shapes of the inputs, rows, open columns, and which linears they touch. Which adapters
are in the pages or in the weights is contents, so adapters never cause a compilation or a capture. What has no graph
runs eagerly at once; it is captured when the engine has nothing else to do. Engine thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_server.models.attention_kernels import AttentionMeter
from lora_server.models.graphs import capture_graph
from lora_server.models.lora_linear import PagedLinears

_log = structlog.get_logger(__name__)
_FUSED_ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
"""The better one first on an H200 (docs/performance.md), for where nothing is measured."""
_MAX_PADDING = 2
"""A batch is padded to a captured number of rows at most this many times its own."""

Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a graph is captured for; inputs by name, without their rows."""

    inputs: Signature
    columns: int
    target_class: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    output: Tensor


class Network(Protocol):
    """What is run: the part of a `ModelFamily` that this file needs."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that are compiled one by one."""
        ...

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """One forward pass."""
        ...


class Denoiser:
    """One denoising network and its graphs."""

    def __init__(self, network: Network, paged: PagedLinears, *, compiled: bool, max_graphs: int) -> None:
        """*compiled* asks for compiled blocks and graphs; without CUDA it is ignored."""
        self._network = network
        self._paged = paged
        self._max_graphs = max_graphs
        self._device = network.device
        self._graphs: dict[Bucket, _Captured] = {}
        self._missed: Counter[Bucket] = Counter()
        self._uncapturable: set[Bucket] = set()
        self._uses_graphs = compiled and self._device.type == "cuda"
        self._attention = [*_FUSED_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        self._pool: Any = None
        self._captures_now = False
        self.captures = 0
        if self._uses_graphs:
            _allow_many_buckets()
            self._pool = torch.cuda.graph_pool_handle()
            for block in network.blocks:
                block.compile(dynamic=False)

    @property
    def uses_graphs(self) -> bool:
        """Whether buckets can be captured."""
        return self._uses_graphs

    @property
    def compiles(self) -> int:
        """Graphs that the compiler has made in this process."""
        if not self._uses_graphs:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def __call__(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Returns the network's prediction for inputs of equally many rows; *options* always run eagerly."""
        rows = len(next(iter(inputs.values())))
        if not self._uses_graphs or options:
            return self.eager(inputs, options)
        bucket = self.bucket(inputs)
        if self._captures_now and len(self._graphs) < self._max_graphs:
            self._capture(bucket, inputs)
        captured = self._find(bucket)
        if captured is None:
            prediction = self.eager(inputs, options)
            if bucket not in self._uncapturable:  # what could not even be run is never asked for
                self._missed[bucket] += 1
            return prediction
        for name, value in inputs.items():
            captured.inputs[name][:rows].copy_(value)
        captured.graph.replay()
        return captured.output[:rows].clone()

    def clear_inputs(self) -> None:
        """Zeroes the inputs of all graphs: rows that a batch does not fill keep what an earlier one put there."""
        for captured in self._graphs.values():
            for value in captured.inputs.values():
                value.zero_()

    def bucket(self, inputs: Mapping[str, Tensor]) -> Bucket:
        """Names the bucket of a batch as the pages are open now."""
        signature = tuple(sorted((name, tuple(value.shape[1:]), value.dtype) for name, value in inputs.items()))
        return Bucket(signature, self._paged.columns, self._paged.target_class, len(next(iter(inputs.values()))))

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within it, a bucket that is met for the first time is compiled and captured, which blocks for seconds."""
        self._captures_now = True
        try:
            yield
        finally:
            self._captures_now = False

    def capture_missed(self) -> bool:
        """Captures the bucket that was missed most, uncompiled, which takes about as long as three steps.

        One that cannot be captured, for want of memory, say, is run eagerly for good. Returns False if there is none to
        try, or no room for another graph.
        """
        if not self._missed or len(self._graphs) >= self._max_graphs:
            return False
        (bucket, _), *_ = self._missed.most_common(1)
        del self._missed[bucket]
        try:
            self._capture_empty(bucket)
        except Exception as error:  # a graph less is no reason to end the engine
            _log.warning("not captured", rows=bucket.rows, columns=bucket.columns, error=repr(error))
            self._uncapturable.add(bucket)
        if bucket in self._uncapturable and self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the error held is free only now
        return True

    def _capture_empty(self, bucket: Bucket) -> None:
        """Captures a bucket with zeros."""
        inputs = {
            name: torch.zeros((bucket.rows, *shape), dtype=dtype, device=self._device)
            for name, shape, dtype in bucket.inputs
        }
        self._paged.open(bucket.columns, bucket.target_class)
        with torch.compiler.set_stance("force_eager"):
            self._capture(bucket, inputs)

    @contextmanager
    def choosing_attention(self) -> Iterator[None]:
        """Within it, every attention runs with each fused kernel; the faster comes first from then on.

        To be done before anything is captured: what is captured keeps its kernel.
        """
        meter = AttentionMeter(_FUSED_ATTENTION)
        with meter:
            yield
        self._attention = [*meter.fastest_first, *self._attention[len(_FUSED_ATTENTION) :]]
        _log.info("attention", kernel=self._attention[0].name, milliseconds=meter.milliseconds)

    def _capture(self, bucket: Bucket, inputs: Mapping[str, Tensor]) -> None:
        if bucket in self._graphs:
            return
        static = {name: value.clone() for name, value in inputs.items()}
        with self._attention_kernel():
            graph, output = capture_graph(lambda: self._forward(static, {}), self._pool)
        self._graphs[bucket] = _Captured(graph, static, output)
        self._missed.pop(bucket, None)
        self.captures += 1
        _log.info("captured", rows=bucket.rows, columns=bucket.columns, inputs=str(dict(s[:2] for s in bucket.inputs)))

    def _find(self, bucket: Bucket) -> _Captured | None:
        """The graph with the fewest rows that are enough, if they are not far too many."""
        exact = self._graphs.get(bucket)
        if exact is not None:
            return exact
        fitting = [
            known
            for known in self._graphs
            if (known.inputs, known.columns, known.target_class) == (bucket.inputs, bucket.columns, bucket.target_class)
            and bucket.rows < known.rows <= _MAX_PADDING * bucket.rows
        ]
        return self._graphs[min(fitting, key=lambda known: known.rows)] if fitting else None

    def eager(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """The same without graphs or compiled code."""
        if self._device.type == "cpu":
            return self._forward(inputs, options)
        with self._attention_kernel(), torch.compiler.set_stance("force_eager"):
            return self._forward(inputs, options)

    def _forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        return self._network.forward(inputs, options)

    @contextmanager
    def _attention_kernel(self) -> Iterator[None]:
        with sdpa_kernel(self._attention, set_priority=True):
            yield


def _allow_many_buckets() -> None:
    """Raises the compiler's limits on shapes of one function: the declared buckets bound them already."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096

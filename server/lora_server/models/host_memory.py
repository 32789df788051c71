"""Host memory for converted adapters: page-locked from one pool as far as that goes, ordinary beyond it.

From page-locked memory a version moves to a CUDA device while the caller goes on. Locking pages takes the driver's
time, milliseconds for an adapter, during which no kernel can be launched; so all of it is locked once, at the start.
Knows nothing of adapters.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable

import structlog
import torch
from torch import Tensor

Allocate = Callable[[int, torch.dtype], Tensor]
"""Returns an uninitialised tensor of (numel,) and a type, in host memory; thread-safe."""

_log = structlog.get_logger(__name__)
_ALIGNMENT = 512


def ordinary_memory(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor in ordinary, pageable memory."""
    return torch.empty(numel, dtype=dtype)


def host_memory(device: torch.device, page_locked_bytes: int) -> Allocate:
    """Returns what makes the memory of adapters for *device*: for CUDA a pool of *page_locked_bytes*, locked now.

    Locking takes about a second for 2 GiB; torch rounds up to a power of two. If the system does not grant so much,
    that is logged and all memory is ordinary.
    """
    if device.type != "cuda" or not page_locked_bytes:
        return ordinary_memory
    try:
        block = torch.empty(page_locked_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _log.warning("no page-locked memory: uploads of adapters will block", bytes=page_locked_bytes, why=str(error))
        return ordinary_memory
    return HostPool(block).allocate


class HostPool:
    """Hands out parts of one block of memory; a part comes back when the last tensor over it is gone. Thread-safe.

    First fit over a list of free ranges, neighbours joined: parts are megabytes, so there are few.
    """

    def __init__(self, block: Tensor) -> None:
        """*block* is (size_bytes,), uint8."""
        self._block = block
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, block.numel())]  # (start, end), ascending, never touching
        # Finalizers put ranges here: they run wherever the last reference goes, even while this thread has the lock.
        self._returned: deque[tuple[int, int]] = deque()

    @property
    def free_bytes(self) -> int:
        """Bytes that are not handed out, in one piece or several."""
        with self._lock:
            self._take_back()
            return sum(end - start for start, end in self._free)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor of (numel,), in ordinary memory if no free range is long enough."""
        if not numel:
            return ordinary_memory(numel, dtype)
        size = numel * dtype.itemsize
        reserved = -(-size // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._take_back()
            start = self._first_fit(reserved)
        if start is None:
            return ordinary_memory(numel, dtype)
        # A buffer of its own, so that the memory's life is that of the tensors over it, and not the block's.
        buffer = (ctypes.c_char * size).from_address(self._block.data_ptr() + start)
        weakref.finalize(buffer, self._give_back, (start, start + reserved)).atexit = False
        return torch.frombuffer(buffer, dtype=dtype)

    def _give_back(self, part: tuple[int, int]) -> None:
        """Called when nobody uses *part* any more; that it is bound to this pool keeps the block as long as needed."""
        self._returned.append(part)

    def _first_fit(self, size: int) -> int | None:
        for k, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[k : k + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def _take_back(self) -> None:
        if not self._returned:
            return
        while self._returned:
            insort(self._free, self._returned.popleft())
        joined: list[tuple[int, int]] = []
        for start, end in self._free:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._free = joined

"""How long a piece of work took: by the clock, or on the device without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Span:
    """A span of time that is known once its work is done."""

    _read_s: Callable[[], float] = float
    _done: Callable[[], bool] = lambda: True
    _wait: Callable[[], None] = lambda: None

    @property
    def seconds(self) -> float:
        """Its length; 0 while it is unknown, as it is on the device until the work is done."""
        return self._read_s()

    @property
    def done(self) -> bool:
        """Whether its work is done; does not wait."""
        return self._done()

    def wait(self) -> None:
        """Blocks until its work is done."""
        self._wait()

    @staticmethod
    @contextmanager
    def clocked() -> Iterator[Span]:
        """Measures what is done within, by the clock."""
        span, began_s = Span(), time.monotonic()
        yield span
        length_s = time.monotonic() - began_s
        span._read_s = lambda: length_s

    @staticmethod
    @contextmanager
    def on_device() -> Iterator[Span]:
        """Measures what the current CUDA stream is given within; does not wait for it."""
        span, first, last = Span(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        try:
            yield span
        finally:
            last.record()
            span._read_s = lambda: first.elapsed_time(last) / 1e3 if last.query() else 0.0
            span._done, span._wait = last.query, last.synchronize

"""An alarm clock: one thread that rings at set moments, so that what ends by itself ends without anybody looking.

Knows nothing of pins; whoever is rung looks for himself.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

import structlog

_log = structlog.get_logger(__name__)


class Alarm:
    """Rings after set spans of time. Thread-safe; the thread begins with the first alarm that is set."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """*ring* is called on the alarm's thread, once or more for the alarms that are due."""
        self._ring = ring
        self._changed = threading.Condition()
        self._due_s: list[float] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, in_s: float) -> None:
        """Rings in *in_s* seconds; ignored after `close`. Never blocks."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._due_s, time.monotonic() + in_s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="alarm", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Rings no more, and waits for the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        while self._wait():
            try:
                self._ring()
            except Exception:
                _log.exception("an alarm failed")

    def _wait(self) -> bool:
        """Waits for the next alarm and takes out all that are due; False when the alarm is closed."""
        with self._changed:
            while not self._closed:
                left_s = self._due_s[0] - time.monotonic() if self._due_s else None
                if left_s is not None and left_s <= 0:
                    while self._due_s and self._due_s[0] <= time.monotonic():
                        heapq.heappop(self._due_s)
                    return True
                self._changed.wait(None if left_s is None else min(left_s, threading.TIMEOUT_MAX))
        return False

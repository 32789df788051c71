"""Lines to a file descriptor, written by a thread of their own: whoever has a line to write never waits for its reader.

Knows nothing of what the lines say.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable

_MAX_PENDING_BYTES = 1024 * 1024


class LineOutput:
    """A bounded queue of lines, and the thread that writes them; thread-safe.

    A line that finds the queue full (the reader of a pipe stands still), or that cannot be written (the reader is gone,
    the disk is full), is dropped and counted. Later lines are tried all the same.
    """

    def __init__(
        self,
        fd: int,
        on_recovered: Callable[[int], None] = lambda _: None,
        max_pending_bytes: int = _MAX_PENDING_BYTES,
    ) -> None:
        """Begins to write to *fd*, which stays the caller's.

        Args:
            fd: An open file descriptor.
            on_recovered: Called from the writing thread with the number of lines that were dropped since the last
                call, once a line can be written again.
            max_pending_bytes: Bound on the lines that wait to be written.
        """
        self._fd = fd
        self._on_recovered = on_recovered
        self._max_pending_bytes = max_pending_bytes
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._dropped = self._told = 0
        self._thread = threading.Thread(target=self._write_pending, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def dropped_lines(self) -> int:
        """How many lines were dropped so far."""
        return self._dropped

    def write_line(self, text: str) -> None:
        """Queues *text* and a line break, or drops it; never blocks, never raises."""
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._closing or self._pending_bytes + len(line) > self._max_pending_bytes:
                self._dropped += 1
                return
            self._pending.append(line)
            self._pending_bytes += len(line)
            self._changed.notify()

    def close(self, timeout_s: float = 1.0) -> None:
        """Waits *timeout_s* at most until what is queued has been written, and takes no more. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_pending(self) -> None:
        while (line := self._next()) is not None:
            try:
                self._write_whole(line)
            except OSError:
                with self._changed:
                    self._dropped += 1
                continue
            self._tell_of_dropped()

    def _next(self) -> bytes | None:
        """Returns the next line, when there is one; None if there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            if not self._pending:
                return None
            line = self._pending.popleft()
            self._pending_bytes -= len(line)
            return line

    def _write_whole(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            with contextlib.suppress(BlockingIOError):  # a terminal that another process made non-blocking
                rest = rest[os.write(self._fd, rest) :]
                continue
            select.select([], [self._fd], [])

    def _tell_of_dropped(self) -> None:
        with self._changed:
            dropped, self._told = self._dropped - self._told, self._dropped
        if dropped:
            self._on_recovered(dropped)

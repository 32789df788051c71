"""Files that are read again when they change (certificates, tokens); the last good content outlives a bad change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

_log = structlog.get_logger(__name__)
_CHECK_INTERVAL_S = 0.5

T = TypeVar("T")
Signature = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """What *parse* makes of *paths*, always from their latest good content. Thread-safe.

    A change is noticed by a stat of each file when the value is asked for, at most twice a second. Replacing a file by
    renaming, or a symbolic link as Kubernetes does, is noticed as well as writing.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        parse: Callable[[], T],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*what* names the files in the log. Raises what *parse* raises, now; later its errors are logged only."""
        self._what, self._paths, self._parse, self._clock = what, paths, parse, clock
        self._lock = threading.Lock()
        self._signature: Signature | None = self._stat()
        self._value = parse()
        self._checked_s = clock()

    def get(self) -> T:
        """Returns the latest good value; reads the files if they have changed."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._checked_s >= _CHECK_INTERVAL_S:
                self._checked_s = now_s
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        signature = self._stat_or_none()
        if signature == self._signature:
            return
        try:
            value = self._parse()
            if self._stat() != signature:  # somebody is still writing; the next call looks again
                return
        except (OSError, ValueError) as error:
            _log.error("changed files cannot be used; the last good ones stay", what=self._what, error=str(error))
        else:
            self._value = value
            _log.info("files reloaded", what=self._what)
        self._signature = signature

    def _stat(self) -> Signature:
        stats = [path.stat() for path in self._paths]
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def _stat_or_none(self) -> Signature | None:
        try:
            return self._stat()
        except OSError:
            return None

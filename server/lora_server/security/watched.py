"""Files that are read again when they change (certificates, tokens); the last good content outlives a bad change.

| the files | value from then on |
|---|---|
| are good | theirs |
| cannot be parsed: half written, a typing error | the last good one; an error in the log |
| are gone, empty or unreadable | the last good one or, where that is unsafe, *when_gone*; an error in the log |
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

_log = structlog.get_logger(__name__)
_CHECK_INTERVAL_S = 0.5

T = TypeVar("T")
Signature = tuple[tuple[int, ...], ...]
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP})
"""What a file itself is the cause of; too many open files, or a disk that fails, are not."""


class NothingInFileError(ValueError):
    """The files can be read, and nothing is in them."""


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
        when_gone: T | None = None,
    ) -> None:
        """*what* names the files in the log. Raises what *parse* raises, now; later its errors are logged only.

        *when_gone* is the value while the files are gone, empty (*parse* raises NothingInFileError) or unreadable; None
        keeps the last good one.
        """
        self._what, self._paths, self._parse, self._clock = what, paths, parse, clock
        self._when_gone = when_gone
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
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            value = self._parse()
            if self._stat() != signature:  # somebody is still writing; the next call looks again
                return
        except NothingInFileError as error:
            self._lose(error)
        except OSError as error:
            if error.errno in _GONE:
                self._lose(error)
                return
            _log.error("files cannot be looked at; the last good ones stay", what=self._what, error=str(error))
        except ValueError as error:
            _log.error("changed files cannot be used; the last good ones stay", what=self._what, error=str(error))
            self._signature = signature
        else:
            self._value, self._signature = value, signature
            _log.info("files reloaded", what=self._what)

    def _lose(self, error: Exception) -> None:
        """Takes the value of files that are gone or empty; says so once."""
        signature = self._stat_or_none()
        if signature != self._signature:
            kept = "the last good ones stay" if self._when_gone is None else "nothing of them is valid any more"
            _log.error(f"files are gone, empty or unreadable; {kept}", what=self._what, error=str(error))
        if self._when_gone is not None:
            self._value = self._when_gone
        self._signature = signature

    def _stat(self) -> Signature:
        """What no change leaves as it is: the time of the inode's change cannot be set by whoever writes a file."""
        stats = [path.stat() for path in self._paths]
        return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)

    def _stat_or_none(self) -> Signature | None:
        try:
            return self._stat()
        except OSError:
            return None

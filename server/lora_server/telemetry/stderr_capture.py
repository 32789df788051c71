"""What libraries write to standard error by themselves, taken line by line, so that it can follow the log's format.

gRPC's core, torch and others write to the file descriptor, past Python. The reading thread also keeps them from waiting
for a log whose reader stands still.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

_STDERR = 2
_MAX_LINE_BYTES = 16 * 1024
_JOIN_S = 0.5

# gRPC (absl): `I1127 20:01:14.123456  123 file.cc:12] text`; torch (c10): `[W1127 20:01:14.123456 file.cpp:12] text`.
_MARKED = re.compile(r"\[?(?P<level>[IWEF])\d{4} [\d:.]+ +(?:\d+ +)?(?P<place>[^\s\]]+:\d+)\] ?(?P<text>.*)", re.DOTALL)
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}


@dataclass(frozen=True, slots=True)
class NativeLine:
    """One line of a library.

    Attributes:
        level: info, warning or error; warning if the line does not say.
        text: What it says.
        place: The file and line of the library's source, if it says.
    """

    level: str
    text: str
    place: str | None = None


def parse_native_line(line: str) -> NativeLine:
    """Takes the level and the place out of a line of gRPC's core or of torch; any other line is text."""
    marked = _MARKED.fullmatch(line)
    if marked is None:
        return NativeLine("warning", line)
    return NativeLine(_LEVELS[marked["level"]], marked["text"], marked["place"])


class StderrCapture:
    """Takes standard error over, for the whole process, until it is stopped."""

    def __init__(self) -> None:
        """Replaces file descriptor 2 by a pipe; `original_fd` is what it was before.

        Raises:
            OSError: If there is no standard error, or no descriptor is left.
        """
        self.original_fd = os.dup(_STDERR)
        self._reading_fd, writing_fd = os.pipe()
        os.dup2(writing_fd, _STDERR)
        os.close(writing_fd)
        self._thread: threading.Thread | None = None

    def start(self, on_line: Callable[[str], None]) -> None:
        """Calls *on_line* from a thread with every line that is not empty, cut at 16 KiB; once."""
        self._thread = threading.Thread(target=self._read, args=(on_line,), name="stderr", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Gives standard error back, and waits half a second at most for what was written to it before."""
        os.dup2(self.original_fd, _STDERR)
        if self._thread is not None:  # a child process may hold the pipe open
            self._thread.join(_JOIN_S)

    def _read(self, on_line: Callable[[str], None]) -> None:
        rest = b""
        while block := os.read(self._reading_fd, 65536):
            *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                _tell(line, on_line)
        _tell(rest, on_line)


def _tell(line: bytes, on_line: Callable[[str], None]) -> None:
    text = line[:_MAX_LINE_BYTES].decode("utf-8", "backslashreplace").rstrip()
    if text:
        with contextlib.suppress(Exception):  # whatever the log does, the pipe must be read
            on_line(text)

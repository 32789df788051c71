"""Structured logs: one event a line, to standard error; JSON for machines, colours for a person's terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from io import StringIO
from typing import Any, Literal, Protocol, TextIO

import structlog
from lora_client.console import printable
from structlog.typing import ExcInfo

from lora_server.bounds import bound_value
from lora_server.telemetry.line_output import LineOutput
from lora_server.telemetry.stderr_capture import StderrCapture, parse_native_line

LogFormat = Literal["auto", "console", "json"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MAX_VALUE_CHARACTERS = 8192
_log = structlog.get_logger(__name__)


class LineSink(Protocol):
    """Where rendered lines go."""

    def write_line(self, text: str) -> None:
        """Takes one line, without its line break."""
        ...


class ProcessLog:
    """The log of a whole process: its own events and the lines of its libraries, none of which makes anybody wait.

    From its start to its end, standard error belongs to it.
    """

    def __init__(self, level: str = "info", log_format: LogFormat = "auto") -> None:
        """Takes standard error over, and sets structlog, `logging` and `warnings` up for the process.

        Raises:
            ValueError: As `configure_logging`.
            OSError: As `StderrCapture`.
        """
        self._capture = StderrCapture()
        fd = self._capture.original_fd
        self._output = LineOutput(fd, on_recovered=lambda lines: _log.warning("log lines were dropped", lines=lines))
        configure_logging(level, log_format, self._output, terminal=os.isatty(fd))
        logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)
        logging.captureWarnings(True)
        self._capture.start(_log_native_line)

    @property
    def original_fd(self) -> int:
        """The file descriptor that standard error was."""
        return self._capture.original_fd

    @property
    def dropped_lines(self) -> int:
        """How many lines could not be written: the log's reader stands still or is gone, or the disk is full."""
        return self._output.dropped_lines

    def write_line(self, text: str) -> None:
        """Writes a line that is no event: the last word of a command. Never blocks."""
        self._output.write_line(printable(text))

    def close(self) -> None:
        """Writes what is left, and gives standard error back. Blocks for less than two seconds."""
        self._capture.stop()
        self._output.close()


class _ToStructlog(logging.Handler):
    """Turns the records of libraries into events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Logs *record*; never raises."""
        try:
            _log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)


def _log_native_line(line: str) -> None:
    native = parse_native_line(line)
    place = {"place": native.place} if native.place else {}
    _log.log(_LEVELS[native.level], native.text, logger="stderr", **place)


def configure_logging(
    level: str = "info", log_format: LogFormat = "auto", sink: LineSink | None = None, *, terminal: bool | None = None
) -> None:
    """Sets up structlog for the process; *auto* is console on a terminal and JSON elsewhere. Idempotent.

    Args:
        level: The least that is logged.
        log_format: How a line looks.
        sink: Where lines go. Default: standard error, and whoever logs waits for it.
        terminal: Whether they go to a terminal. Default: whether standard error is one.

    Raises:
        ValueError: If *level* is none of debug, info, warning and error.
    """
    if level not in _LEVELS:
        raise ValueError(f"unknown log level {level!r}; choose one of {', '.join(_LEVELS)}")
    if terminal is None:
        terminal = sys.stderr.isatty()
    console = log_format == "console" or (log_format == "auto" and terminal)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([_printable] if console else [structlog.processors.format_exc_info]),
            _bounded,
            _console_renderer(terminal) if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr) if sink is None else _LineLoggerFactory(sink),
    )


class _LineLogger:
    """What structlog ends in: hands rendered lines to a sink."""

    def __init__(self, sink: LineSink) -> None:
        self.msg = sink.write_line
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.log = self.msg


class _LineLoggerFactory:
    """Makes the same logger for everybody."""

    def __init__(self, sink: LineSink) -> None:
        self._logger = _LineLogger(sink)

    def __call__(self, *_: Any) -> _LineLogger:
        return self._logger


def _console_renderer(terminal: bool) -> structlog.dev.ConsoleRenderer:
    colors = terminal and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
    return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback)


def _write_traceback(file: TextIO, exc_info: ExcInfo) -> None:
    """Without the values of variables, which would be prompts and tokens; the message may quote a file."""
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    file.write("\n".join(printable(line) for line in _cut(text.getvalue()).split("\n")))


def _bounded(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cuts values, so that no caller can make a line of the log as long as a request."""
    for key, value in event.items():
        event[key] = _cut(value) if isinstance(value, str) else bound_value(value)
    return event


def _printable(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Takes the controls out of texts; JSON escapes them by itself."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value)
    return event


def _cut(text: str) -> str:
    """Keeps the beginning and the end, where a traceback has its message."""
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    half = _MAX_VALUE_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text)} characters) ... {text[-half:]}"

"""Structured logs: one event a line, to standard error; JSON for machines, colours for a person's terminal."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from lora_server.bounds import bound_event

LogFormat = Literal["auto", "console", "json"]


def configure_logging(level: str = "info", log_format: LogFormat = "auto") -> None:
    """Sets up structlog for the process; *auto* is console on a terminal and JSON elsewhere. Idempotent.

    Raises:
        ValueError: If *level* is none of debug, info, warning and error.
    """
    levels = {
        "debug": logging.DEBUG,
        "info": logging.INFO,
        "warning": logging.WARNING,
        "error": logging.ERROR,
    }
    if level not in levels:
        raise ValueError(f"unknown log level {level!r}; choose one of {', '.join(levels)}")
    # Tracebacks without the values of variables, which would be prompts and tokens.
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            bound_event,
            renderer if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(levels[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

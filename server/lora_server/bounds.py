"""Bounds on what is repeated of others' values: in errors, and in the log. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

MAX_MESSAGE_CHARS = 4_000
MAX_VALUE_CHARS = 1_000
_MAX_TRACEBACK_CHARS = 32_000
_MAX_ITEMS = 64


def shorten(text: str, limit: int) -> str:
    """Returns *text*, cut to *limit* characters if it has more; the end says so."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def bound_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cuts long values of a log line, as a processor of structlog: no request makes a line of megabytes."""
    for key, value in event.items():
        event[key] = _bounded(value, _MAX_TRACEBACK_CHARS if key == "exception" else MAX_MESSAGE_CHARS)
    return event


def _bounded(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, bytes):
        return value[:limit]
    if isinstance(value, list | tuple):
        return [_bounded(each, MAX_VALUE_CHARS) for each in value[:_MAX_ITEMS]]
    if isinstance(value, Mapping):
        return {key: _bounded(each, MAX_VALUE_CHARS) for key, each in list(value.items())[:_MAX_ITEMS]}
    return value

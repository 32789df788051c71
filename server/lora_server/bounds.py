"""Bounds on what is repeated of others' values: in errors, and in the log. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

MAX_MESSAGE_CHARS = 4_000
MAX_VALUE_CHARS = 1_000
_MAX_TRACEBACK_CHARS = 32_000
_CHARS_AN_ITEM = 64


def shorten(text: str, limit: int) -> str:
    """Returns *text*, cut to *limit* characters if it has more; the end says so."""
    return text if len(text) <= limit else f"{text[: max(limit - 3, 0)]}..."


def bound_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cuts long values of a log line, as a processor of structlog: no request makes a line of megabytes."""
    for key, value in event.items():
        event[key] = _bounded(value, _MAX_TRACEBACK_CHARS if key == "exception" else MAX_MESSAGE_CHARS)
    return event


def _bounded(value: Any, limit: int) -> Any:
    """Cuts texts to *limit*, and what lists and mappings hold to a quarter of it each, at every depth."""
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, bytes):
        return value[:limit]
    most = max(limit // _CHARS_AN_ITEM, 1)
    if isinstance(value, list | tuple):
        return [_bounded(each, limit // 4) for each in value[:most]]
    if isinstance(value, Mapping):
        return {key: _bounded(each, limit // 4) for key, each in list(value.items())[:most]}
    return value

"""Bounds on what is repeated of others' values: in errors, and in the log. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_CHARS = 4_000
MAX_VALUE_CHARS = 1_000
_CHARS_AN_ITEM = 64


def shorten(text: str, limit: int) -> str:
    """Returns *text*, cut to *limit* characters if it has more; the end says so."""
    return text if len(text) <= limit else f"{text[: max(limit - 3, 0)]}..."


def bound_value(value: Any, limit: int = MAX_MESSAGE_CHARS) -> Any:
    """Cuts texts to *limit*, and what lists and mappings hold to a quarter of it each, at every depth."""
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, bytes):
        return value[:limit]
    most = max(limit // _CHARS_AN_ITEM, 1)
    if isinstance(value, list | tuple):
        return [bound_value(each, limit // 4) for each in value[:most]]
    if isinstance(value, Mapping):
        return {key: bound_value(each, limit // 4) for key, each in list(value.items())[:most]}
    return value

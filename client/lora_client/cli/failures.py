"""Errors of `lora-client`: one line each, and the exit code."""

from __future__ import annotations

from lora_client.console import os_error_text, tell, tell_usage, usage_error
from lora_client.errors import LoraClientError

_EXIT_CODES = {
    "INVALID_ARGUMENT": 2,
    "NOT_FOUND": 3,
    "UNAVAILABLE": 4,
    "DEADLINE_EXCEEDED": 4,
    "PERMISSION_DENIED": 5,
    "UNAUTHENTICATED": 5,
    "ALREADY_EXISTS": 5,
    "FAILED_PRECONDITION": 5,
    "RESOURCE_EXHAUSTED": 6,
}


def tell_error(error: Exception) -> int:
    """Tells *error* in one line and returns its exit code; raises it again if nobody expects it."""
    usage = usage_error(error)
    if usage is not None:
        tell_usage(error, usage)
        return 2
    if isinstance(error, LoraClientError):
        tell(f"error: {error}{f' ({error.reason})' if error.reason else ''}")
        return _EXIT_CODES.get(error.code, 1)
    if isinstance(error, OSError):
        tell(f"error: {os_error_text(error)}")
        return 1
    if isinstance(error, ValueError):
        tell(f"error: {error}")
        return 2
    raise error

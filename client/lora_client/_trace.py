"""The trace context that a call carries to the server: of OpenTelemetry if the caller uses it, else of the environment.

Imports nothing of OpenTelemetry unless the caller's process has it already.
"""

from __future__ import annotations

import os
import re
import sys

_KEYS = ("traceparent", "tracestate")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns `traceparent`, and `tracestate` if there is one, of the span that is current; empty without one.

    A process without OpenTelemetry passes on the environment's TRACEPARENT, as shells and CI systems set it.
    """
    carrier: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(carrier)
    given = os.environ.get("TRACEPARENT", "")
    if "traceparent" not in carrier and _TRACEPARENT.fullmatch(given):
        carrier["traceparent"] = given
    return tuple((key, carrier[key]) for key in _KEYS if key in carrier)

"""Spans of requests, as OpenTelemetry gets them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry.sdk")

from lora_server.monitoring.tracing import Tracing
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.monitoring.house import TRACEPARENT, summary


def test_stages_are_spans_under_the_callers_trace() -> None:
    """The request is a child of the call, its stages are its children, with their own times, inside of it."""
    exporter = InMemorySpanExporter()
    tracing = Tracing("unused", "1", exporter)
    tracing.request_ended(summary())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"request", "queue", "denoise", "decode"}
    whole = spans["request"]
    assert f"{whole.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    for name in ("queue", "denoise", "decode"):
        assert spans[name].parent.span_id == whole.context.span_id
        assert whole.start_time <= spans[name].start_time <= spans[name].end_time <= whole.end_time
    assert spans["denoise"].attributes["lora.steps"] == 4
    assert abs(spans["queue"].end_time - spans["queue"].start_time - 5e8) < 1e6


def test_a_failed_request_is_an_error_span() -> None:
    """Its reason is the status."""
    exporter = InMemorySpanExporter()
    Tracing("unused", "1", exporter).request_ended(summary("GPU_OUT_OF_MEMORY"))
    (whole,) = [span for span in exporter.get_finished_spans() if span.name == "request"]
    assert (whole.status.is_ok, whole.status.description) == (False, "GPU_OUT_OF_MEMORY")


def test_nothing_of_opentelemetry_is_imported_unless_it_is_configured() -> None:
    """Neither by the server's room for it nor by the client."""
    code = (
        "import sys, lora_server.cli, lora_client.cli.main\n"
        "from lora_server.monitoring.station import Station\n"
        "from lora_server.config import TelemetryConfig\n"
        "Station(TelemetryConfig(), '1')\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

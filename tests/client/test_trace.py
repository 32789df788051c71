"""The trace context that a call carries."""

from __future__ import annotations

import pytest
from lora_client._trace import trace_metadata

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_environments_context_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells and CI systems set it; what is none is not."""
    monkeypatch.setenv("TRACEPARENT", GIVEN)
    assert trace_metadata() == (("traceparent", GIVEN),)
    monkeypatch.setenv("TRACEPARENT", "00-nonsense\r\nx: y")
    assert trace_metadata() == ()


def test_the_current_span_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that uses OpenTelemetry needs nothing else."""
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    monkeypatch.setenv("TRACEPARENT", GIVEN)
    with trace.TracerProvider().get_tracer("t").start_as_current_span("call") as span:
        ((key, value),) = trace_metadata()
    assert key == "traceparent"
    assert value.split("-")[1] == f"{span.get_span_context().trace_id:032x}"

"""OpenTelemetry traces, for those who configure them: the call by gRPC's instrumentation, a request's stages by us.

Needs the extra `[otel]`; nothing of it is imported unless an endpoint is configured. The stages' spans are made when a
request has ended, with the times at which they were, so that the engine knows nothing of traces.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from lora_server.observer import OK, RequestSummary, SilentObserver

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_STATUS_CODE = "rpc.grpc.status_code"
_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""The canonical codes by number."""
_EXPORT_TIMEOUT_S = 5
_STOP_TIMEOUT_MS = 2000


class OtelMissingError(RuntimeError):
    """Traces are configured, and their libraries are not installed."""

    def __init__(self) -> None:
        super().__init__("traces need more libraries: pip install 'lora-inference[server,otel]'")


class Tracing(SilentObserver):
    """Makes spans and exports them."""

    def __init__(self, endpoint: str, version: str, exporter: SpanExporter | None = None) -> None:
        """Exports to *endpoint* by OTLP over gRPC, in the background; to *exporter* in its place, at once, in tests.

        Raises:
            OtelMissingError: If the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        except ImportError as error:
            raise OtelMissingError() from error
        # A stream that is abandoned ends in another context than it began in; OpenTelemetry complains, to no avail.
        logging.getLogger("opentelemetry.context").setLevel(logging.CRITICAL)
        resource = Resource.create({"service.name": "lora-server", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        if exporter is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        else:
            otlp = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
            self._provider.add_span_processor(BatchSpanProcessor(otlp))
        self._tracer = self._provider.get_tracer("lora_server", version)

    def interceptors(self) -> list[Any]:
        """Returns the interceptors of a grpc.aio server: a span a call, but not for health checks and reflection."""
        from opentelemetry.instrumentation import grpc as instrumentation

        make: Any = instrumentation.aio_server_interceptor  # not typed
        return [make(tracer_provider=self._provider, filter_=_ours)]

    def traceparent(self) -> str | None:
        """Returns the W3C trace context of the call that runs now; None outside of one."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier.get("traceparent")

    def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """Sets the status of the call's span: the instrumentation does not see statuses with details."""
        del method, seconds
        from opentelemetry.trace import Status, StatusCode, get_current_span

        span = get_current_span()
        span.set_attribute(_STATUS_CODE, _CODES.index(code))
        if code != OK:
            span.set_attribute("error.type", reason or code)
            span.set_status(Status(StatusCode.ERROR, reason or code))

    def request_ended(self, summary: RequestSummary) -> None:
        """Makes the spans of a request and of its stages, under the call that brought it."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        def at(moment_s: float) -> int:
            return int((moment_s + offset_s) * 1e9)

        offset_s = time.time() - time.monotonic()
        request, stats = summary.request, summary.stats
        carrier = {"traceparent": request.traceparent} if request.traceparent else {}
        parent = TraceContextTextMapPropagator().extract(carrier)
        whole = self._tracer.start_span("request", parent, start_time=at(summary.accepted_s))
        whole.set_attribute("lora.request_id", request.request_id)
        whole.set_attribute("lora.tenant", request.tenant)
        whole.set_attribute("lora.outcome", summary.outcome)
        whole.set_attribute("lora.adapters", [each.digest for each in summary.adapters])
        if summary.outcome != OK:
            whole.set_status(Status(StatusCode.ERROR, summary.outcome))
        inside = set_span_in_context(whole)
        for stage in summary.stages:
            span = self._tracer.start_span(stage.name, inside, start_time=at(stage.began_s))
            if stage.name == "denoise":
                span.set_attribute("lora.steps", stats.completed_steps)
                span.set_attribute("lora.way", stats.way.value)
                span.set_attribute("lora.mean_batch_images", stats.mean_batch_images)
            span.end(at(min(stage.ended_s, summary.ended_s)))
        whole.end(at(summary.ended_s))

    def stop(self) -> None:
        """Exports what is left, for at most a few seconds, and ends. Blocks."""
        self._provider.force_flush(_STOP_TIMEOUT_MS)
        self._provider.shutdown()


def _ours(details: Any) -> bool:
    return str(details.method).startswith("/lora_api.")

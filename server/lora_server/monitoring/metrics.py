"""Prometheus metrics of what happens: durations and outcomes, as the house tells them. A registry of its own.

What the house counts itself (steps, switches, hits) is read at each scrape, by `monitoring.collector`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from lora_server.observer import RequestSummary
from lora_server.types import ApplicationWay

_WAITS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """An observer whose facts Prometheus can scrape from `registry`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._calls = counter(
            "lora_calls", "RPCs that ended, by canonical code and reason.", ("method", "code", "reason")
        )
        self._call_s = histogram("lora_call_seconds", "Duration of RPCs.", _WAITS_S, ("method",))
        self._requests = counter("lora_requests", "Accepted requests that ended: OK, or a reason.", ("outcome",))
        self._refused = counter("lora_requests_refused", "Requests that were not accepted, by reason.", ("reason",))
        self._stages = {
            name: histogram(f"lora_request_{name}_seconds", f"{text} of requests that got their images.", _WAITS_S)
            for name, text in {
                "queue": "Wait for their turn",
                "adapter_wait": "Wait for their adapters",
                "text_encode": "Encoding of the prompts",
                "denoise": "Denoising",
                "decode": "Decoding of latents",
                "image_encode": "Encoding of files",
                "total": "Whole duration",
            }.items()
        }
        self._step_s = histogram("lora_step_seconds", "Duration of a denoising step of one batch.", _STEPS_S, ("way",))
        self._rows = histogram("lora_step_rows", "Rows of a batch, those for guidance included.", _ROWS, ("way",))
        self._loads = histogram(
            "lora_adapter_load_seconds",
            "Reading, checking and converting an adapter, by the kind of its source and by outcome.",
            _WAITS_S,
            ("source", "outcome"),
        )
        self._out_of_memory = counter("lora_out_of_memory", "Times the device ran out of memory, by stage.", ("stage",))
        for way in ApplicationWay:  # so that rates have a beginning
            self._step_s.labels(way.value)
            self._rows.labels(way.value)
        for reason in ("QUEUE_FULL", "INVALID_REQUEST"):
            self._refused.labels(reason)
        for stage in ("upload", "encode", "step", "preview", "decode"):
            self._out_of_memory.labels(stage)

    def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """Counts an RPC."""
        self._calls.labels(method, code, reason).inc()
        self._call_s.labels(method).observe(seconds)

    def request_refused(self, request_id: str, tenant: str, reason: str) -> None:
        """Counts a request that was not accepted."""
        del request_id, tenant
        self._refused.labels(reason).inc()

    def request_ended(self, summary: RequestSummary) -> None:
        """Counts a request, and where the time of one that got its images went."""
        self._requests.labels(summary.outcome).inc()
        if summary.stats.completed_steps and summary.outcome == "OK":
            for name, histogram in self._stages.items():
                histogram.observe(getattr(summary.stats, f"{name}_time_s"))

    def step_ended(self, way: ApplicationWay, rows: int, seconds: float) -> None:
        """Counts a step."""
        self._step_s.labels(way.value).observe(seconds)
        self._rows.labels(way.value).observe(rows)

    def adapter_loaded(self, source: str, outcome: str, seconds: float) -> None:
        """Counts a load."""
        self._loads.labels(source, outcome).observe(seconds)

    def out_of_memory(self, stage: str) -> None:
        """Counts a lack of memory."""
        self._out_of_memory.labels(stage).inc()

    def engine_restarted(self) -> None:
        """The engine counts these itself."""

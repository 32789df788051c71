"""Everything that listens and tells, built from the configuration: the room's one door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from lora_server.config import TelemetryConfig
from lora_server.monitoring.collector import CacheCounters, EngineCounters, HouseCollector
from lora_server.monitoring.exporter import Exporter
from lora_server.monitoring.fan_out import FanOut
from lora_server.monitoring.metrics import Metrics
from lora_server.monitoring.request_log import RequestLog
from lora_server.monitoring.tracing import Tracing
from lora_server.monitoring.uses import AdapterUses
from lora_server.observer import Observer

_log = structlog.get_logger(__name__)


class Station:
    """The request log, the counts of adapters, and, as configured, metrics and traces."""

    def __init__(self, config: TelemetryConfig, version: str, dropped_log_lines: Callable[[], int] = lambda: 0) -> None:
        """Builds everything, and listens for Prometheus at once if that is configured.

        *dropped_log_lines* returns how many lines of the log could not be written.

        Raises:
            OSError: If the address of metrics cannot be bound.
            OtelMissingError: If traces are configured and the extra `[otel]` is not installed.
        """
        self.uses = AdapterUses(config.metrics_adapters)
        observers: list[Observer] = [RequestLog(prompts=config.log_prompts), self.uses]
        self._tracing = Tracing(config.otlp_endpoint, version) if config.otlp_endpoint else None
        if self._tracing is not None:
            observers.append(self._tracing)
        self._collector: HouseCollector | None = None
        self._exporter: Exporter | None = None
        if config.metrics_listen is not None:
            metrics = Metrics()
            self._collector = HouseCollector(version, self.uses, dropped_log_lines)
            metrics.registry.register(self._collector)
            self._exporter = Exporter(config.metrics_listen, metrics.registry)
            observers.append(metrics)
            _log.info("metrics", address=self._exporter.address)
        self.observer = FanOut(observers)

    def interceptors(self) -> list[Any]:
        """Returns what a grpc.aio server needs for traces; nothing without them."""
        return [] if self._tracing is None else self._tracing.interceptors()

    def traceparent(self) -> str | None:
        """Returns the trace context of the call that runs now, if there is one."""
        return None if self._tracing is None else self._tracing.traceparent()

    def watch(self, engine: EngineCounters, adapters: CacheCounters) -> None:
        """Begins to publish the house's own counters; the server serves from now on."""
        if self._collector is not None:
            self._collector.watch(engine, adapters)
            self._collector.serving = True

    def not_serving(self) -> None:
        """Notes that the server takes no more work."""
        if self._collector is not None:
            self._collector.serving = False

    def stop(self) -> None:
        """Exports what is left and ends. Blocks for a few seconds at most."""
        if self._exporter is not None:
            self._exporter.stop()
        if self._tracing is not None:
            self._tracing.stop()

"""The house's own counters as Prometheus metrics: read at each scrape, in this one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_server.monitoring.uses import AdapterUses
from lora_server.types import ApplicationWay, CacheInfo, DeviceMemory, EngineInfo, ModelInfo, QueueInfo


class EngineCounters(Protocol):
    """What is read of the engine; `engine.api.Engine` has it."""

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        ...

    def info(self) -> EngineInfo:
        """Its counters."""
        ...

    def queue_info(self) -> QueueInfo:
        """The queue."""
        ...


class CacheCounters(Protocol):
    """What is read of the adapter manager."""

    def cache_info(self) -> CacheInfo:
        """Its books."""
        ...


class HouseCollector(Collector):
    """Reads the engine and the adapter manager once they are there; until then only `lora_serving`, which is 0."""

    def __init__(self, version: str, uses: AdapterUses, dropped_log_lines: Callable[[], int] = lambda: 0) -> None:
        self._version = version
        self._uses = uses
        self._dropped_log_lines = dropped_log_lines
        self._house: tuple[EngineCounters, CacheCounters] | None = None
        self.serving = False

    def watch(self, engine: EngineCounters, adapters: CacheCounters) -> None:
        """Begins to read."""
        self._house = engine, adapters

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics; called by the registry, on a thread of the exporter."""
        yield _gauge("lora_serving", "Whether the server takes work: 1 or 0.", float(self.serving))
        yield CounterMetricFamily(
            "lora_log_lines_dropped", "Lines of the log that could not be written.", self._dropped_log_lines()
        )
        if self._house is None:
            return
        engine, adapters = self._house
        build = GaugeMetricFamily("lora_build_info", "Always 1.", labels=["version", "model", "device", "dtype"])
        build.add_metric([self._version, engine.model.name, engine.model.device, engine.model.dtype], 1)
        yield build
        info, cache = engine.info(), adapters.cache_info()
        yield from _queue(engine.queue_info(), info)
        yield from _work(info)
        yield from _tiers(cache, info)
        yield from _holds(cache)
        text = "Adapters whose changes could not be written to the state directory; 0 when all is well."
        yield _gauge("lora_state_unsaved_adapters", text, cache.unsaved_adapters)
        if info.device_memory is not None:
            yield _memory(info.device_memory)
        yield _labelled(
            CounterMetricFamily("lora_adapter_uses", "Uses of the most used adapters; 'other' are the rest.",
                                labels=["adapter"]),
            self._uses.labelled(),
        )  # fmt: skip


def _queue(queue: QueueInfo, info: EngineInfo) -> Iterator[Metric]:
    yield _gauge("lora_queue_requests", "Requests that wait.", queue.queued_requests)
    yield _gauge("lora_queue_limit_requests", "Requests that may wait.", queue.max_queued_requests)
    yield _gauge("lora_queue_tenants", "Tenants that have requests waiting.", queue.waiting_tenants)
    yield _gauge("lora_running_requests", "Requests that have started.", queue.running_requests)
    yield _gauge("lora_active_images", "Images that are being denoised.", info.active_images)
    yield _gauge("lora_unread_bytes", "Images that are made and not taken by their callers.", queue.unread_bytes)
    yield _gauge("lora_unread_limit_bytes", "The most of them.", queue.max_unread_bytes)
    yield _gauge("lora_retained_bytes", "Results that are kept for retries.", queue.retained_bytes)
    if queue.estimated_wait_s is not None:
        text = "When all accepted work should be done, by the measured rate."
        yield _gauge("lora_queue_estimated_wait_seconds", text, queue.estimated_wait_s)


def _work(info: EngineInfo) -> Iterator[Metric]:
    steps = {way.value: info.steps_by_way.get(way, 0) for way in ApplicationWay}
    text = "Batches stepped, by how adapters were applied."
    yield _labelled(CounterMetricFamily("lora_steps", text, labels=["way"]), steps)
    for name, help_text, value in (
        ("image_steps", "Images in those batches, summed.", info.image_steps),
        ("images", "Images made.", info.finished_images),
        ("switches", "Changes of the merged weights.", info.switches),
        ("page_writes", "Adapters written into pages.", info.page_writes),
        ("compiles", "Graphs made by the compiler.", info.compiles),
        ("captures", "CUDA graphs captured.", info.captures),
        ("engine_restarts", "Times that the engine died and began anew.", info.restarts),
    ):
        yield CounterMetricFamily(f"lora_{name}", help_text, value=value)


def _tiers(cache: CacheInfo, info: EngineInfo) -> Iterator[Metric]:
    counters = {
        "hits": ("Uses that found what they needed", cache.hits, cache.device_hits, info.prompt_hits),
        "misses": ("Uses that did not", cache.misses, cache.device_misses, info.prompt_misses),
        "evictions": ("Entries evicted", cache.evictions, cache.device_evictions, info.prompt_evictions),
    }
    for name, (text, *values) in counters.items():
        family = CounterMetricFamily(f"lora_cache_{name}", f"{text}, by tier.", labels=["tier"])
        yield _labelled(family, dict(zip(("host", "device", "prompts"), values, strict=True)))
    used = {"host": cache.used_bytes, "device": info.device_adapter_bytes, "prompts": info.prompt_bytes}
    yield _labelled(GaugeMetricFamily("lora_cache_bytes", "Bytes in use, by tier.", labels=["tier"]), used)
    budgets = {"host": cache.budget_bytes, "prompts": info.prompt_budget_bytes}
    yield _labelled(GaugeMetricFamily("lora_cache_budget_bytes", "Bytes allowed, by tier.", labels=["tier"]), budgets)
    entries = {"host": cache.cached_adapters, "device": cache.resident_adapters}
    yield _labelled(GaugeMetricFamily("lora_cache_adapters", "Versions held, by tier.", labels=["tier"]), entries)
    limits = {"host": cache.max_adapters, "device": cache.device_slots}
    yield _labelled(
        GaugeMetricFamily("lora_cache_limit_adapters", "Versions allowed, by tier.", labels=["tier"]), limits
    )


def _holds(cache: CacheInfo) -> Iterator[Metric]:
    pins = {"host": cache.pinned_adapters, "device": cache.device_pinned_adapters}
    yield _labelled(GaugeMetricFamily("lora_pins", "Versions pinned, by tier.", labels=["tier"]), pins)
    yield _gauge("lora_pinned_bytes", "Bytes of pinned versions in host memory.", cache.pinned_bytes)
    yield _gauge("lora_leases", "Leases that requests hold now.", cache.leases)


def _memory(memory: DeviceMemory) -> Metric:
    kinds = {
        "total": memory.total_bytes,
        "free": memory.free_bytes,
        "allocated": memory.allocated_bytes,
        "reserved": memory.reserved_bytes,
    }
    return _labelled(GaugeMetricFamily("lora_device_memory_bytes", "The device's memory.", labels=["kind"]), kinds)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _labelled(
    family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]
) -> CounterMetricFamily | GaugeMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family

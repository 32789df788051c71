"""What the handlers need of the rest of the house: an engine, adapters, and a few facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from lora_server.adapters.api import LoadOutcome
from lora_server.engine.api import Engine
from lora_server.observer import Observer, SilentObserver
from lora_server.types import AdapterInfo, AdapterSource, ById, ByName, CacheInfo, PinLevel


class Adapters(Protocol):
    """The control plane of `adapters.manager.AdapterManager`; see there."""

    def load(
        self,
        source: AdapterSource,
        *,
        default_scale: float | None = None,
        replace: bool = False,
        tenants: frozenset[str] | None = None,
    ) -> Future[LoadOutcome]:
        """Reads, checks, registers and caches an adapter."""
        ...

    def unload(self, ref: ByName | ById, *, drain: bool = False) -> int:
        """Forgets an adapter; returns the bytes freed now."""
        ...

    def pin(self, ref: ByName | ById, level: PinLevel, ttl_s: float | None = None) -> Future[AdapterInfo]:
        """Keeps an adapter loaded."""
        ...

    def unpin(self, ref: ByName | ById) -> AdapterInfo:
        """Ends a pin."""
        ...

    def get(self, ref: ByName | ById) -> AdapterInfo:
        """Returns one adapter."""
        ...

    def list(self) -> tuple[AdapterInfo, ...]:
        """Returns all adapters by name."""
        ...

    def cache_info(self) -> CacheInfo:
        """Returns the books of the cache."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """What a serving server serves with.

    Attributes:
        observer: Who is told of requests that are refused.
        traceparent: Returns the trace context of the call that runs now, if there are traces.
        top_adapters: Returns so many of the most used adapters, by name, with their uses.
    """

    engine: Engine
    adapters: Adapters
    version: str
    start_time_s: float
    result_retention_s: float
    observer: Observer = field(default_factory=SilentObserver)
    traceparent: Callable[[], str | None] = lambda: None
    top_adapters: Callable[[int], Sequence[tuple[str, int]]] = lambda _: ()

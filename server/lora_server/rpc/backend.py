"""What the handlers need of the rest of the house: an engine, adapters, and a few facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from lora_server.adapters.api import LoadOutcome
from lora_server.adapters.store import ContentStore
from lora_server.engine.api import Engine
from lora_server.observer import Observer, SilentObserver
from lora_server.types import (
    OPERATOR,
    AdapterInfo,
    AdapterSource,
    ById,
    ByName,
    CacheInfo,
    Digest,
    Glance,
    PinLevel,
    Viewer,
)


class Adapters(Protocol):
    """The control plane of `adapters.manager.AdapterManager`; see there."""

    def load(
        self,
        source: AdapterSource,
        *,
        default_scale: float | None = None,
        replace: bool = False,
        allow_partial: bool = False,
        tenants: frozenset[str] | None = None,
        viewer: Viewer = OPERATOR,
    ) -> Future[LoadOutcome]:
        """Reads, checks, registers and caches an adapter."""
        ...

    def unload(self, ref: ByName | ById, *, drain: bool = False, viewer: Viewer = OPERATOR) -> int:
        """Forgets an adapter; returns the bytes freed now."""
        ...

    def pin(
        self, ref: ByName | ById, level: PinLevel, ttl_s: float | None = None, viewer: Viewer = OPERATOR
    ) -> Future[AdapterInfo]:
        """Keeps an adapter loaded."""
        ...

    def unpin(self, ref: ByName | ById, viewer: Viewer = OPERATOR) -> AdapterInfo:
        """Ends a pin."""
        ...

    def get(self, ref: ByName | ById, viewer: Viewer = OPERATOR) -> AdapterInfo:
        """Returns one adapter that *viewer* finds."""
        ...

    def page(self, viewer: Viewer = OPERATOR, after: str = "", prefix: str = "") -> Iterator[AdapterInfo]:
        """Yields the adapters that *viewer* finds, by name, from a name on."""
        ...

    def glance(self, name: str, viewer: Viewer = OPERATOR) -> Glance | None:
        """Returns what is seen at a glance of an adapter that *viewer* finds."""
        ...

    @property
    def store(self) -> ContentStore | None:
        """Where uploads go; None if the server keeps none."""
        ...

    def release_upload(self, digest: Digest) -> None:
        """Ends the hold on an upload that was loaded, or not."""
        ...

    def saved(self) -> Future[None]:
        """Returns a future that is done when all that was changed so far survives a crash."""
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
        top_adapters: Yields the most used adapters first: name, uses, and whether only the given tenant finds the name.
    """

    engine: Engine
    adapters: Adapters
    version: str
    start_time_s: float
    result_retention_s: float
    observer: Observer = field(default_factory=SilentObserver)
    traceparent: Callable[[], str | None] = lambda: None
    top_adapters: Callable[[str | None], Iterable[tuple[str, int, bool]]] = lambda _: ()

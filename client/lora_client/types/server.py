"""What a server tells of its adapters and of itself. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class Component:
    """What a version adapts in one component of the pipeline."""

    name: str
    num_modules: int
    min_rank: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the server understood of an adapter's files; see the contract's LoadReport for each field."""

    dialect: str
    kinds: tuple[str, ...]
    min_rank: int
    max_rank: int
    min_alpha: float
    max_alpha: float
    components: tuple[Component, ...]
    size_bytes: int
    digest: str
    base_model: str
    title: str
    trigger_words: tuple[str, ...]
    suggested_scale: float | None
    num_unmatched_keys: int
    unmatched_keys: tuple[str, ...]
    merged_only: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an adapter's weights; *state* is registered, loading, cached, resident or failed."""

    digest: str
    size_bytes: int
    rank: int
    components: tuple[Component, ...]
    state: str
    load_time: datetime | None
    last_use_time: datetime | None
    failure: str
    trigger_words: tuple[str, ...] = ()
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator's pin: *level* is host or device; *expire_time* None has no end."""

    level: str
    expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered adapter; versions are the most recently loaded first."""

    name: str
    ids: tuple[int, ...]
    path: str
    versions: tuple[Version, ...]
    current_digest: str
    pin: Pin | None
    default_scale: float
    tenants: tuple[str, ...] | None = None
    """The only tenants that may use it; None is everybody."""

    @property
    def current(self) -> Version:
        """The version that new requests get."""
        return next(version for version in self.versions if version.digest == self.current_digest)


@dataclass(frozen=True, slots=True)
class AdapterUseCount:
    """How often an adapter was used since the server's start; *state* is `unspecified` if it was unloaded since."""

    name: str
    uses: int
    state: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class ServerWatch:
    """What the server does at one moment; counters run since its start. Sections are as in `ServerInfo`."""

    time: datetime
    start_time: datetime
    model: str
    queue: dict[str, object]
    cache: dict[str, object]
    engine: dict[str, object]
    adapters: tuple[AdapterUseCount, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is; each section maps the contract's field names to values."""

    version: str
    start_time: datetime
    model: dict[str, object]
    limits: dict[str, object]
    cache: dict[str, object]
    queue: dict[str, object]
    engine: dict[str, object]
    retention_time: timedelta

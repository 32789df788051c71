"""The adapter manager: what is known, what is cached, who may use it. Thread-safe, and pure Python.

The front door of the room: owns the one lock, and joins what has rooms of its own (`resolver`: a request as a whole;
`ensure`: from names to cached versions; `leases`; `reads`: threads that wait for the disk; `waiting`: those who wait
for others, on no thread; `books`: registry, cache and slots, changed together).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path

import structlog

from lora_server.adapters.api import AdapterLease, Loader, LoadOutcome, ResolvedAdapter, Weights
from lora_server.adapters.books import Books
from lora_server.adapters.cache import AdapterCache
from lora_server.adapters.ensure import Ensured, Ensurer, Registration, Search
from lora_server.adapters.expiry import Alarm
from lora_server.adapters.futures import chain_own, done, recover
from lora_server.adapters.hub import GRACE_S
from lora_server.adapters.keeper import Keeper
from lora_server.adapters.leases import Leases
from lora_server.adapters.reads import Pool, Reads, thread_pool
from lora_server.adapters.records import Record, Standing, StoredCopy
from lora_server.adapters.registry import Registry
from lora_server.adapters.resolver import Resolver
from lora_server.adapters.slots import SlotTable
from lora_server.adapters.snapshots import adapter_info
from lora_server.adapters.source import HUB_SCHEME
from lora_server.adapters.state import PinLostError, StateFile
from lora_server.adapters.store import ContentStore
from lora_server.adapters.tenants import HubGrants
from lora_server.adapters.waiting import WaitingList
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinnedError,
    LoraServerError,
)
from lora_server.types import (
    OPERATOR,
    AdapterInfo,
    AdapterSource,
    AdapterUse,
    ById,
    ByName,
    CacheInfo,
    Digest,
    Glance,
    PinInfo,
    PinLevel,
    Viewer,
)

_log = structlog.get_logger(__name__)
_AT_A_TIME = 32
_PIN_ATTEMPTS = 4
"""How often a version that is to be pinned may go before it is."""
_LEAST_ALARM_S = 0.05
"""Between two looks at a pin whose end the wall clock has put off."""


class AdapterManager:
    """Adapters by name, cached in memory, leased to requests. Every method is thread-safe."""

    def __init__(
        self,
        config: CacheConfig,
        loader: Loader,
        *,
        min_free_slots: int = 1,
        clock: Callable[[], float] = time.time,
        pool: Pool = thread_pool,
        store: ContentStore | None = None,
        state: StateFile | None = None,
        sweep_downloads: Callable[[Callable[[], Collection[Path]], float], int] | None = None,
        grants: HubGrants | None = None,
    ) -> None:
        """*min_free_slots* of the device stay free of pins; *clock* gives Unix time in seconds, *pool* the threads.

        *store* and *state*, of one state directory, have what survives a restart; None for nothing.
        *sweep_downloads*, which may block, removes downloads that no registered adapter needs, but for those of the
        last so many seconds. *grants* say which repositories of the hub requests may name; None for all.
        """
        self._config = config
        self._clock = clock
        self._lock = threading.RLock()
        self._registry = Registry(config.max_on_demand_adapters)
        self._cache: AdapterCache[Weights] = AdapterCache(
            config.budget_bytes, config.max_adapters, config.max_pinned_share
        )
        self.slots = SlotTable(config.device_slots, min_free_slots)
        self._books = Books(self._registry, self._cache, self.slots, clock)
        self._waiting = WaitingList(self._lock)
        self._alarm = Alarm(self._on_alarm)
        self._reads = Reads(loader, config.loader_threads, self._lock, pool)
        self._ensurer = Ensurer(self._lock, loader, self._reads, self._books, self._waiting, store, grants)
        self._keeper = Keeper(self._lock, loader, self._books, store, state)
        self._sweep_downloads = sweep_downloads
        self._renewals: set[Future[AdapterInfo]] = set()
        self._books.on_stale_copy = self._on_stale_copy
        self._resolver = Resolver(self._lock, self._ensurer, self._reads, self._books, self._waiting)
        self._leases = Leases(self._lock, loader, self._reads, self._books, self._waiting)

    # Control plane

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
        """Reads, checks, registers and caches an adapter; idempotent. Returns at once; the future has the errors.

        *allow_partial* leaves out tensors whose module the model has not, now and whenever it is read again. New
        content at a known folder becomes its current version. *tenants* binds the adapter at the moment it is
        registered, none of them opens it to everybody, and None leaves it. What requests of *viewer*'s own tenant have
        named so becomes what is registered; of others', nothing counts. A failed load changes nothing.
        """

        how = Registration(replace, allow_partial, tenants, default_scale)

        def outcome(ensured: Ensured) -> LoadOutcome | Future[LoadOutcome]:
            record = ensured.record
            if source.path.startswith(HUB_SCHEME) and ensured.load_time_s:  # a branch has moved, perhaps
                self._sweep()
            with self._lock:
                stored = record.stored
                if (
                    record.pin is None
                    or not self._keeper.copies(record)
                    or (stored and stored.digest == record.current)
                ):
                    return LoadOutcome(self._info(record), ensured.load_time_s)
            copied = self._copy_anew(record, ensured.version.digest)  # a pin's copy must be of the new version
            return chain_own(copied, lambda info: LoadOutcome(info, ensured.load_time_s))

        return chain_own(self._reads.resolve(lambda: self._ensurer.load(source, how, viewer)), outcome)

    def unload(self, ref: ByName | ById, *, drain: bool = False, viewer: Viewer = OPERATOR) -> int:
        """Forgets an adapter and frees its bytes; returns the bytes freed now. Never blocks.

        Raises:
            AdapterNotFoundError, AdapterPinnedError: As their names say.
            AdapterInUseError: If a request leases a version, unless *drain*: then its bytes go with the last lease.
        """
        with self._lock:
            self._books.expire_pins()
            record = self._registry.find(ref, viewer)
            if record.pin is not None or record.lost_pin is not None:
                raise AdapterPinnedError(record.name)
            if not drain and any(self._cache.is_leased(digest) for digest in record.versions):
                raise AdapterInUseError(record.name)
            freed_bytes = self._books.remove(record)
        self._waiting.retry()
        if record.source.path.startswith(HUB_SCHEME):
            self._sweep()
        return freed_bytes

    def pin(
        self, ref: ByName | ById, level: PinLevel, ttl_s: float | None = None, viewer: Viewer = OPERATOR
    ) -> Future[AdapterInfo]:
        """Keeps an adapter loaded, and loads it first if need be; replaces an earlier pin. Returns at once.

        What only *viewer*'s requests have named is registered by that. With a store, its files are copied there, so
        that a vanished source cannot take it away. The future fails with CacheExhaustedError if the pin cannot be kept
        beside the others, and changes nothing.
        """
        return self._pin(ref, PinInfo(level, None if ttl_s is None else self._clock() + ttl_s), viewer)

    def _pin(
        self, ref: ByName | ById, pin: PinInfo, viewer: Viewer, attempts: int = _PIN_ATTEMPTS
    ) -> Future[AdapterInfo]:
        """Pins what a name means; begins again if that gets another version before the pin is there."""

        def find() -> Record:
            record = self._registry.find(ref, viewer)
            self._books.check_pin(record)
            return record

        def ensure() -> Future[Ensured]:
            return self._ensurer.found(Search(find))

        def hold(ensured: Ensured) -> Future[AdapterInfo]:
            if not self._keeper.copies(ensured.record):
                return recover(lease(ensured, None), again)
            copying = self._reads.resolve(
                lambda: done(self._keeper.copy(ensured.record, ensured.version.digest)),
                undo=lambda copy: self._keeper.release(copy.key),
            )
            return recover(chain_own(copying, lambda copy: lease(ensured, copy)), again)

        def again(error: BaseException) -> Future[AdapterInfo]:
            """The version has gone meanwhile, evicted or overwritten: the name has another, or none."""
            if attempts > 1 and isinstance(error, AdapterError):
                return self._pin(ref, pin, viewer, attempts - 1)
            raise error

        def lease(ensured: Ensured, copy: StoredCopy | None) -> Future[AdapterInfo]:
            leased = self._leases.acquire({ensured.version.digest: ensured.record})
            pinned = chain_own(leased, lambda held: set_pin(ensured, held, copy))
            if copy is not None:
                pinned.add_done_callback(lambda _: self._let_go(copy.key))
            return pinned

        def set_pin(ensured: Ensured, held: AdapterLease, copy: StoredCopy | None) -> AdapterInfo | Future[AdapterInfo]:
            return self._set_pin(ensured, held, pin, copy) or self._pin(ref, pin, viewer, attempts)

        return chain_own(self._reads.resolve(ensure), hold)

    def _let_go(self, key: Digest) -> None:
        """Ends a hold on files of the store, on a thread that may wait for the disk."""

        def work() -> Future[None]:
            self._keeper.release(key)
            return done(None)

        self._reads.resolve(work)

    def _set_pin(
        self, ensured: Ensured, held: AdapterLease, pin: PinInfo, copy: StoredCopy | None
    ) -> AdapterInfo | None:
        """Pins what *held* keeps cached; returns None if the adapter has another version by now."""
        with held, self._lock:
            record = self._registry.live(ensured.record)
            if record.current != ensured.version.digest:
                return None
            self._books.promote(record)
            self._books.set_pin(record, pin, copy)
            if pin.expire_time_s is not None:
                self._alarm.set(max(pin.expire_time_s - self._clock(), 0.0))
            return self._info(record)

    def _copy_anew(self, record: Record, digest: Digest) -> Future[AdapterInfo]:
        """Copies a pinned record's new version into the store, in place of an old copy; its pin may end meanwhile."""

        def keep(copy: StoredCopy) -> AdapterInfo:
            with self._lock:
                live = self._registry.live(record)
                if live.pin is not None and live.current == digest:
                    self._books.set_stored(live, copy)
                return self._info(live)

        def work() -> Future[AdapterInfo]:
            copy = self._keeper.copy(record, digest)
            try:
                return done(keep(copy))
            finally:
                self._keeper.release(copy.key)

        return self._reads.resolve(work)

    def _sweep(self) -> None:
        """Removes downloads that nobody needs any more, on a thread that may wait for the disk."""
        sweep = self._sweep_downloads
        if sweep is not None:
            self._reads.fetch(lambda: sweep(self._folders, GRACE_S))

    def _folders(self) -> list[Path]:
        with self._lock:
            return [record.folder for record in self._registry.known()]

    def _on_stale_copy(self, record: Record) -> None:
        """A request has found a pinned source changed: the server's own copy follows, and nobody waits for it."""
        if not self._keeper.copies(record):
            return
        copying = self._copy_anew(record, record.current)

        def tell(copied: Future[AdapterInfo]) -> None:
            self._renewals.discard(copied)
            if not copied.cancelled() and (error := copied.exception()) is not None:
                _log.warning("a pin's copy was not renewed", adapter=record.name, error=str(error))

        self._renewals.add(copying)
        copying.add_done_callback(tell)

    def unpin(self, ref: ByName | ById, viewer: Viewer = OPERATOR) -> AdapterInfo:
        """Ends an adapter's pin; idempotent, never blocks. Raises AdapterNotFoundError."""
        with self._lock:
            self._books.expire_pins()
            record = self._registry.find(ref, viewer)
            self._books.clear_pin(record)
            info = self._info(record)
        self._waiting.retry()
        return info

    def get(self, ref: ByName | ById, viewer: Viewer = OPERATOR) -> AdapterInfo:
        """Returns one adapter that *viewer* finds; changes nothing. Raises AdapterNotFoundError.

        To an operator it shows what only requests of another tenant have named, too, as bound to that tenant.
        """
        with self._lock:
            self._books.expire_pins()
            try:
                return self._info(self._registry.find(ref, viewer))
            except AdapterNotFoundError:
                record = self._registry.found_by_a_tenant(ref) if viewer.is_operator else None
                if record is None:
                    raise
                return replace(self._info(record), tenants=frozenset({record.owner or ""}))

    def list(self, viewer: Viewer = OPERATOR) -> tuple[AdapterInfo, ...]:
        """Returns what *viewer* finds, by name; changes nothing."""
        return tuple(self.page(viewer))

    def page(self, viewer: Viewer = OPERATOR, after: str = "", prefix: str = "") -> Iterator[AdapterInfo]:
        """Yields what *viewer* finds by name, of names after *after* that begin with *prefix*; changes nothing.

        The lock is held for a few adapters at a time, so that nobody waits for a long list. What is changed meanwhile
        may be as it was or as it is.
        """
        with self._lock:
            self._books.expire_pins()
            records = self._registry.page(viewer, after, prefix)
        while True:
            with self._lock:
                infos = [self._info(record) for record in islice(records, _AT_A_TIME)]
            if not infos:
                return
            yield from infos

    def glance(self, name: str, viewer: Viewer = OPERATOR) -> Glance | None:
        """Returns what is seen at a glance of an adapter that *viewer* finds; changes nothing. None for none."""
        with self._lock:
            record = self._registry.named(name, viewer)
            if record is None:
                return None
            return Glance(
                self._ensurer.state_of(record, record.current_version),
                is_pinned=(record.pin or record.lost_pin) is not None,
                is_on_demand=record.standing is not Standing.REGISTERED,
            )

    def cache_info(self) -> CacheInfo:
        """Returns the books of the cache."""
        with self._lock:
            self._books.expire_pins()
            return CacheInfo(
                budget_bytes=self._config.budget_bytes,
                used_bytes=self._cache.used_bytes,
                pinned_bytes=self._cache.pinned_bytes,
                max_adapters=self._config.max_adapters,
                cached_adapters=len(self._cache),
                device_slots=self.slots.num_slots,
                resident_adapters=self.slots.num_resident,
                hits=self._ensurer.hits,
                misses=self._reads.started,
                evictions=self._cache.evictions,
                max_pinned_bytes=self._cache.max_pinned_bytes,
                pinned_adapters=self._cache.num_pinned,
                device_pinned_adapters=self.slots.num_pinned,
                leases=self._cache.num_leases,
                device_hits=self.slots.hits,
                device_misses=self.slots.misses,
                device_evictions=self.slots.evictions,
                unsaved_adapters=self._keeper.num_unsaved,
            )

    # What survives a restart

    @property
    def store(self) -> ContentStore | None:
        """Where uploads go; None if nothing is kept."""
        return self._keeper.store

    def release_upload(self, digest: Digest) -> None:
        """Ends the hold that kept an upload in the store until it was loaded; unless it was, it is removed. Blocks."""
        self._keeper.release(digest)

    def saved(self) -> Future[None]:
        """Returns a future that is done when all that was changed so far survives a crash; at once without a state."""
        return self._keeper.saved()

    def restore(self, *, strict: bool = False) -> None:
        """Registers what an earlier process left, and caches and pins again what was pinned. Blocks; to be called once.

        A pin that cannot be satisfied is listed as FAILED, and tried again whenever its adapter is read.

        Raises:
            StateDamagedError: If the state cannot be understood.
            PinLostError: If *strict*, of the first pin that cannot be satisfied.
        """
        for record in self._keeper.restore():
            if record.lost_pin is None:
                continue
            try:
                self._restore_pin(record)
            except LoraServerError as error:
                if strict:
                    raise PinLostError(record.name, str(error)) from error
                _log.error("a pin could not be restored", adapter=record.name, error=str(error))
                with self._lock:
                    record.current_version.failure = str(error)
        renewals = list(self._renewals)
        if renewals:  # what is copied anew is safe, and what it replaces gone, before anybody is served
            wait(renewals)
            self.saved().exception()
        if self._sweep_downloads is not None:
            self._sweep_downloads(self._folders, 0.0)

    def _restore_pin(self, record: Record) -> None:
        """Caches a version again, the server's own copy before its source if it is of that version, and pins it."""
        ways = [self._ensurer.stored, self._ensurer.record]
        if record.stored is None or record.stored.digest != record.current:
            ways.reverse()
        try:
            ways[0](record).result()
        except LoraServerError:
            ways[1](record).result()
        with self._lock:
            if record.lost_pin is not None:
                self._books.set_pin(record, record.lost_pin)
            if record.pin is not None and record.pin.expire_time_s is not None:
                self._alarm.set(max(record.pin.expire_time_s - self._clock(), 0.0))
            has_copy = record.stored is not None and record.stored.digest == record.current
        if not has_copy:  # the process ended between the pin and its copy
            self._on_stale_copy(record)

    # Data plane

    def resolve(self, uses: Sequence[AdapterUse], tenant: str | None = None) -> Future[tuple[ResolvedAdapter, ...]]:
        """Fixes each use to a version and caches what is not cached; holds nothing afterwards. Returns at once.

        What is bound to other tenants than *tenant* is not found, cached or not; None is the operator, who finds all.
        What uses name by sources is found by *tenant*'s later requests, once all of this one is accepted. The future
        fails with the first use's domain error, with InvalidRequestError if two uses are one version, and with
        CacheExhaustedError if they can never be cached together beside the pins.
        """
        return self._resolver.resolve(uses, tenant)

    def acquire(self, adapters: Sequence[ResolvedAdapter]) -> Future[AdapterLease]:
        """Leases the versions of all *adapters*, or none. Returns at once, with a done future if all are cached.

        What was evicted meanwhile is read again, and must have the same digest; what was bound to others meanwhile is
        not found. Waits, on no thread, while leases of others are in the way. A future that was cancelled leaves no
        lease behind.
        """
        wanted = {adapter.applied.digest: adapter.found for adapter in adapters if adapter.found is not None}

        def note() -> None:
            for adapter in adapters:
                if adapter.found is None:
                    continue
                if not self._registry.still_finds(adapter.found, adapter.viewer):
                    raise AdapterNotFoundError(adapter.applied.name)
                self._books.note_use(adapter.applied.digest, adapter.found, adapter.viewer)

        return self._leases.acquire(wanted, note)

    def watch_device_pins(self, on_pin: Callable[[ResolvedAdapter], None]) -> None:
        """Calls *on_pin*, which must not block, for every version that is to be brought to the device for good.

        Those that are pinned already are told now.
        """
        with self._lock:
            self._books.watch_device_pins(on_pin)

    def watch_forgotten(self, on_forgotten: Callable[[], None]) -> None:
        """Calls *on_forgotten*, which must not block, whenever a version may have lost its slot for good."""
        self._books.on_forgotten = on_forgotten

    @property
    def waiting_count(self) -> int:
        """How many loads and leases wait for leases of others to end."""
        return len(self._waiting)

    @property
    def reading_count(self) -> int:
        """How many folders are being read, or are to be."""
        return len(self._reads)

    @property
    def leased_count(self) -> int:
        """How many leases of versions are out."""
        with self._lock:
            return self._cache.num_leases

    def check_integrity(self) -> None:
        """Recomputes the books of every part; AssertionError if they are wrong."""
        with self._lock:
            self._books.check_integrity()

    def close(self) -> None:
        """Stops the threads; what is still waited for fails with ServerDrainingError. Blocks for running reads."""
        self._waiting.close()
        self._alarm.close()
        self._reads.close()
        self._keeper.close()

    def _on_alarm(self) -> None:
        """Ends the pins that are due, and lets those try again who may have waited for it; on the alarm's thread."""
        with self._lock:
            self._books.expire_pins()
            next_s = self._books.next_pin_end_s()
            if next_s is not None:  # the clock may have been set back
                self._alarm.set(max(next_s - self._clock(), _LEAST_ALARM_S))
        self._waiting.retry()

    # Records and versions; all with the lock held

    def _info(self, record: Record) -> AdapterInfo:
        return adapter_info(record, lambda version: self._ensurer.state_of(record, version))

"""The adapter manager: what is known, what is cached, who may use it. Thread-safe, and pure Python.

Owns the registry, the host cache and the slot table behind one lock. Files are read on loader threads, one read a
folder however many ask; nothing is registered or evicted before a file has been read and checked. Whoever waits for
leases of others waits in a list, not on a thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from lora_server.adapters.api import AdapterLease, LoadedAdapter, Loader, LoadOutcome, ResolvedAdapter, Weights
from lora_server.adapters.books import Books
from lora_server.adapters.cache import AdapterCache
from lora_server.adapters.futures import chain, complete, fail, gather
from lora_server.adapters.registry import Record, Registry, Version
from lora_server.adapters.slots import SlotTable
from lora_server.adapters.snapshots import adapter_info
from lora_server.adapters.source import Signature
from lora_server.adapters.tenants import check_admitted, check_source
from lora_server.adapters.uses import check_uses
from lora_server.adapters.waiting import WaitingList
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterDigestMismatchError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinnedError,
    FieldFault,
    InvalidRequestError,
    LoraServerError,
    ServerDrainingError,
)
from lora_server.types import (
    AdapterInfo,
    AdapterSource,
    AdapterState,
    AdapterUse,
    AppliedAdapter,
    ByDigest,
    ById,
    ByName,
    CacheInfo,
    Digest,
    PinInfo,
    PinLevel,
)

_RESOLVER_THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ensured:
    """A record whose current version is cached (or was, a moment ago)."""

    record: Record
    version: Version
    state_on_arrival: AdapterState
    load_time_s: float


def _bind(record: Record, tenants: frozenset[str] | None) -> Record:
    """Binds *record* to *tenants*: none of them is everybody, and None changes nothing."""
    if tenants is not None:
        record.tenants = tenants or None
    return record


class AdapterManager:
    """Adapters by name, cached in memory, leased to requests. Every method is thread-safe."""

    def __init__(
        self,
        config: CacheConfig,
        loader: Loader,
        *,
        min_free_slots: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """*min_free_slots* of the device stay free of pins; *clock* gives Unix time in seconds."""
        self._config = config
        self._loader = loader
        self._clock = clock
        self._lock = threading.RLock()
        self._registry = Registry()
        self._cache: AdapterCache[Weights] = AdapterCache(
            config.budget_bytes, config.max_adapters, config.max_pinned_share
        )
        self.slots = SlotTable(config.device_slots, min_free_slots)
        self._books = Books(self._registry, self._cache, self.slots, clock)
        self._reads: dict[tuple[Path, Signature], Future[LoadedAdapter]] = {}
        self._waiting = WaitingList(self._lock)
        self._hits = self._misses = 0
        self._loaders = ThreadPoolExecutor(config.loader_threads, thread_name_prefix="loader")
        # Apart from the loaders, so that a request whose adapters are warm never queues behind a cold one.
        self._resolvers = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolver")

    # Control plane

    def load(
        self,
        source: AdapterSource,
        *,
        default_scale: float | None = None,
        replace: bool = False,
        tenants: frozenset[str] | None = None,
    ) -> Future[LoadOutcome]:
        """Reads, checks, registers and caches an adapter; idempotent. Returns at once; the future has the errors.

        New content at a known folder becomes its current version. *tenants* binds the adapter at the moment it is
        registered, none of them opens it to everybody, and None leaves it. A failed load changes nothing.
        """

        def outcome(ensured: _Ensured) -> LoadOutcome:
            with self._lock:
                if default_scale is not None:
                    ensured.record.default_scale = default_scale
                return LoadOutcome(self._info(ensured.record), ensured.load_time_s)

        return chain(self._start(lambda: self._ensure_source(source, replace=replace, bind=tenants)), outcome, Future())

    def unload(self, ref: ByName | ById, *, drain: bool = False) -> int:
        """Forgets an adapter and frees its bytes; returns the bytes freed now. Never blocks.

        Raises:
            AdapterNotFoundError, AdapterPinnedError: As their names say.
            AdapterInUseError: If a request leases a version, unless *drain*: then its bytes go with the last lease.
        """
        with self._lock:
            self._books.expire_pins()
            record = self._registry.find(ref)
            if record.pin is not None:
                raise AdapterPinnedError(record.name)
            if not drain and any(self._cache.is_leased(digest) for digest in record.versions):
                raise AdapterInUseError(record.name)
            self._registry.remove(record)
            freed_bytes = sum(self._books.forget(digest) for digest in record.versions)
        self._waiting.retry()
        return freed_bytes

    def pin(self, ref: ByName | ById, level: PinLevel, ttl_s: float | None = None) -> Future[AdapterInfo]:
        """Keeps an adapter loaded, and loads it first if need be; replaces an earlier pin. Returns at once.

        The future fails with CacheExhaustedError if the pin cannot be kept beside the others, and changes nothing.
        """
        expire_time_s = None if ttl_s is None else self._clock() + ttl_s

        def ensure() -> Future[_Ensured]:
            with self._lock:
                record = self._registry.find(ref)
                self._books.check_pin(record)
            return self._ensure_record(record)

        def pin(ensured: _Ensured) -> Future[AdapterInfo]:
            lease = self._lease([ensured.version.digest], {})

            def set_pin(held: AdapterLease) -> AdapterInfo:
                with held, self._lock:
                    self._books.set_pin(ensured.record, PinInfo(level, expire_time_s))
                    return self._info(ensured.record)

            return chain(lease, set_pin, Future())

        return chain(self._start(ensure), pin, Future())

    def unpin(self, ref: ByName | ById) -> AdapterInfo:
        """Ends an adapter's pin; idempotent, never blocks. Raises AdapterNotFoundError."""
        with self._lock:
            self._books.expire_pins()
            record = self._registry.find(ref)
            self._books.clear_pin(record)
            info = self._info(record)
        self._waiting.retry()
        return info

    def get(self, ref: ByName | ById) -> AdapterInfo:
        """Returns one adapter; changes nothing. Raises AdapterNotFoundError."""
        with self._lock:
            self._books.expire_pins()
            return self._info(self._registry.find(ref))

    def list(self) -> tuple[AdapterInfo, ...]:
        """Returns all adapters by name; changes nothing."""
        with self._lock:
            self._books.expire_pins()
            return tuple(self._info(record) for record in self._registry)

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
                hits=self._hits,
                misses=self._misses,
                evictions=self._cache.evictions,
                max_pinned_bytes=self._cache.max_pinned_bytes,
                pinned_adapters=self._cache.num_pinned,
                device_pinned_adapters=self.slots.num_pinned,
                leases=self._cache.num_leases,
                device_hits=self.slots.hits,
                device_misses=self.slots.misses,
                device_evictions=self.slots.evictions,
            )

    # Data plane

    def resolve(self, uses: Sequence[AdapterUse], tenant: str | None = None) -> Future[tuple[ResolvedAdapter, ...]]:
        """Fixes each use to a version and caches what is not cached; holds nothing afterwards. Returns at once.

        What is bound to other tenants than *tenant* is not found, cached or not; None is the operator, who finds all.
        The future fails with the first use's domain error, with InvalidRequestError if two uses are one version, and
        with CacheExhaustedError if they can never be cached together beside the pins.
        """
        if not uses:
            done: Future[tuple[ResolvedAdapter, ...]] = Future()
            complete(done, ())
            return done
        ensured = gather([self._start(partial(self._ensure_use, use, tenant)) for use in uses])
        return chain(ensured, lambda found: self._resolved(uses, found, tenant), Future())

    def acquire(self, adapters: Sequence[ResolvedAdapter]) -> Future[AdapterLease]:
        """Leases the versions of all *adapters*, or none. Returns at once, with a done future if all are cached.

        What was evicted meanwhile is read again, and must have the same digest. Waits, on no thread, while leases of
        others are in the way. A future that was cancelled leaves no lease behind.
        """
        digests = [adapter.applied.digest for adapter in adapters]
        with self._lock:
            missing = [digest for digest in dict.fromkeys(digests) if digest not in self._cache]
        if not missing:
            return self._lease(digests, {})
        reads = gather([self._start(partial(self._reread, digest)) for digest in missing])
        return chain(reads, lambda loaded: self._lease(digests, {each.digest: each for each in loaded}), Future())

    def watch_device_pins(self, on_pin: Callable[[ResolvedAdapter], None]) -> None:
        """Calls *on_pin*, which must not block, for every version that is to be brought to the device for good.

        Those that are pinned already are told now.
        """
        with self._lock:
            self._books.watch_device_pins(on_pin)

    def check_integrity(self) -> None:
        """Recomputes the books of every part; AssertionError if they are wrong."""
        with self._lock:
            self._cache.check_integrity()
            self.slots.check_integrity()
            for record in self._registry:
                assert record.current in record.versions
                assert record.pin is None or record.current in self._cache

    def close(self) -> None:
        """Stops the threads; what is still waited for fails with ServerDrainingError. Blocks for running reads."""
        self._waiting.close()
        self._resolvers.shutdown(wait=True, cancel_futures=True)
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # Making sure that a version is there

    def _start(self, work: Callable[[], Future[T]]) -> Future[T]:
        """Runs *work* on a resolver thread; its result, or its future's, is the returned future's."""
        try:
            return chain(self._resolvers.submit(work), lambda started: started, Future())
        except RuntimeError:  # the pool is shut down
            refused: Future[T] = Future()
            fail(refused, ServerDrainingError())
            return refused

    def _ensure_use(self, use: AdapterUse, tenant: str | None) -> Future[_Ensured]:
        selector = use.selector
        if isinstance(selector, AdapterSource):
            return self._ensure_source(selector, replace=False, tenant=tenant)
        with self._lock:
            if isinstance(selector, ByDigest):
                record = self._registry.find_version(selector.digest, tenant)
            else:
                record = self._registry.find(selector)
                check_admitted(record, tenant, selector.name if isinstance(selector, ByName) else selector.id)
        wanted = selector.digest if isinstance(selector, ByDigest) else use.expected_digest
        return self._ensure_record(record, wanted)

    def _ensure_source(
        self, source: AdapterSource, *, replace: bool, tenant: str | None = None, bind: frozenset[str] | None = None
    ) -> Future[_Ensured]:
        """Registers and caches a source for *tenant*, and binds it to *bind*; on a resolver thread."""
        folder = self._loader.locate(source.path)
        with self._lock:
            check_source(self._registry, source, folder, tenant)
        signature = self._loader.signature(folder)
        with self._lock:
            record = self._registry.tags(source, folder, replace=replace).record
            if record is not None and record.folder != folder:
                record = None  # it will be replaced
            state = self._state(record, folder, signature)
            if record is not None and record.signature == signature and record.current in self._cache:
                self._books.tag(record, source, folder)
                _bind(record, bind)
                return self._found(record, record.current_version)
        began_s = time.monotonic()

        def install(loaded: LoadedAdapter) -> Future[_Ensured]:
            def register() -> Record:
                check_source(self._registry, source, folder, tenant)
                return _bind(self._books.record_of(source, folder, loaded, replace), bind)

            return self._install(loaded, began_s, state, register)

        return chain(self._read(folder, signature), install, Future())

    def _ensure_record(self, record: Record, wanted: Digest | None = None) -> Future[_Ensured]:
        """Caches a record's current version, or an older one that is *wanted* and still cached."""
        with self._lock:
            if wanted is not None and wanted != record.current and wanted in record.versions and wanted in self._cache:
                return self._found(record, record.versions[wanted])
        signature = self._loader.signature(self._loader.locate(str(record.folder)))
        with self._lock:
            state = self._state(record, record.folder, signature)
            if record.signature == signature and record.current in self._cache:
                return self._found(record, record.current_version)
        began_s = time.monotonic()

        def install(loaded: LoadedAdapter) -> Future[_Ensured]:
            return self._install(loaded, began_s, state, lambda: self._books.update(record, loaded))

        reading = self._read(record.folder, signature)
        reading.add_done_callback(lambda done: self._note_failure(record, done))
        return chain(reading, install, Future())

    def _found(self, record: Record, version: Version) -> Future[_Ensured]:
        self._cache.get(version.digest)
        self._hits += 1
        state = AdapterState.RESIDENT if self.slots.is_resident(version.digest) else AdapterState.CACHED
        found: Future[_Ensured] = Future()
        complete(found, _Ensured(record, version, state, 0.0))
        return found

    def _read(self, folder: Path, signature: Signature) -> Future[LoadedAdapter]:
        """Reads a folder on a loader thread; concurrent reads of one content are one read."""
        key = (folder, signature)
        with self._lock:
            reading = self._reads.get(key)
            if reading is not None:
                return reading
            self._misses += 1
            try:
                reading = self._loaders.submit(self._loader.load, folder)
            except RuntimeError as error:
                raise ServerDrainingError() from error
            self._reads[key] = reading
        reading.add_done_callback(lambda _: self._reads.pop(key, None))
        return reading

    def _reread(self, digest: Digest) -> Future[LoadedAdapter]:
        """Reads a known version again, for a lease."""
        with self._lock:
            record = self._registry.find_version(digest)
        signature = self._loader.signature(self._loader.locate(str(record.folder)))

        def check(loaded: LoadedAdapter) -> LoadedAdapter:
            if loaded.digest != digest:
                raise AdapterDigestMismatchError(record.name, digest, loaded.digest)
            return loaded

        return chain(self._read(record.folder, signature), check, Future())

    def _install(
        self, loaded: LoadedAdapter, began_s: float, state: AdapterState, register: Callable[[], Record]
    ) -> Future[_Ensured]:
        """Caches what was read and then registers it; waits while only leases are in the way.

        *register* runs with the lock held and the version cached; if it raises, the version is let go again.
        """
        installed: Future[_Ensured] = Future()
        load_time_s = max(time.monotonic() - began_s, 1e-6)

        def attempt() -> _Ensured | None:
            self._books.expire_pins()
            known = loaded.digest in self._cache
            if not self._cache.put({loaded.digest: (loaded.weights, loaded.weights.size_bytes)}):
                return None
            try:
                record = register()
            except LoraServerError:
                if not known:
                    self._cache.remove(loaded.digest)
                raise
            return _Ensured(record, record.versions[loaded.digest], state, load_time_s)

        self._waiting.complete_when_possible(attempt, installed)
        return installed

    def _lease(self, digests: Sequence[Digest], loaded: Mapping[Digest, LoadedAdapter]) -> Future[AdapterLease]:
        """Leases all *digests*, cached or among *loaded*; waits while only leases of others are in the way."""
        leased: Future[AdapterLease] = Future()
        wanted = tuple(dict.fromkeys(digests))
        held: dict[Digest, tuple[Weights, int]] = {
            digest: (each.weights, each.weights.size_bytes) for digest, each in loaded.items()
        }

        def attempt() -> AdapterLease | None:
            self._books.expire_pins()
            for digest in wanted:  # keep what is cached now, in case it is evicted while this waits
                cached = self._cache.get(digest)
                if cached is not None:
                    held[digest] = (cached, cached.size_bytes)
                elif digest not in held:
                    raise AdapterNotFoundError(digest)
            if not self._cache.put({digest: held[digest] for digest in wanted}):
                return None
            weights = {digest: self._cache.lease(digest) for digest in wanted}
            self._books.note_use(wanted)
            return AdapterLease(weights, lambda: self._release(wanted))

        self._waiting.complete_when_possible(attempt, leased, undo=lambda lease: lease.release())
        return leased

    def _release(self, digests: Sequence[Digest]) -> None:
        with self._lock:
            for digest in digests:
                self._cache.release(digest)
        self._waiting.retry()

    # Records and versions; all with the lock held

    def _resolved(
        self, uses: Sequence[AdapterUse], found: Sequence[_Ensured], tenant: str | None
    ) -> tuple[ResolvedAdapter, ...]:
        """Checks the uses against one another and against what they expect, and once more that *tenant* may."""
        with self._lock:  # a binding may have changed while something was read
            for ensured in found:
                check_admitted(ensured.record, tenant, ensured.record.name)
        seen: dict[Digest, int] = {}
        for place, (use, ensured) in enumerate(zip(uses, found, strict=True)):
            digest = ensured.version.digest
            expected = use.selector.digest if isinstance(use.selector, ByDigest) else use.expected_digest
            if expected is not None and expected != digest:
                raise AdapterDigestMismatchError(ensured.record.name, expected, digest)
            if digest in seen:
                detail = f"is the adapter of spec.adapters[{seen[digest]}] again"
                raise InvalidRequestError([FieldFault(f"spec.adapters[{place}]", detail)])
            seen[digest] = place
        check_uses(uses, [(ensured.record.name, ensured.version) for ensured in found])
        with self._lock:
            self._books.expire_pins()
            loose = [e.version.size_bytes for e in found if e.version.digest not in self._cache]
            self._cache.check_fits(sum(loose), len(loose), kept=seen)
            return tuple(self._resolved_one(use, ensured) for use, ensured in zip(uses, found, strict=True))

    def _resolved_one(self, use: AdapterUse, ensured: _Ensured) -> ResolvedAdapter:
        record, version = ensured.record, ensured.version
        scale = record.default_scale if use.scale is None else use.scale
        applied = AppliedAdapter(record.name, record.ids[0], version.digest, scale, use.settings)
        words = version.trigger_words if use.settings.use_trigger_words else ()
        return ResolvedAdapter(applied, ensured.state_on_arrival, ensured.load_time_s, version.size_bytes, words)

    def _note_failure(self, record: Record, done: Future[LoadedAdapter]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        with self._lock:
            record.current_version.failure = str(error) if isinstance(error, LoraServerError) else ""

    def _state(self, record: Record | None, folder: Path, signature: Signature) -> AdapterState:
        if record is not None and record.current in self._cache and record.signature == signature:
            return AdapterState.RESIDENT if self.slots.is_resident(record.current) else AdapterState.CACHED
        return AdapterState.LOADING if (folder, signature) in self._reads else AdapterState.REGISTERED

    def _info(self, record: Record) -> AdapterInfo:
        return adapter_info(record, lambda version: self._version_state(record, version))

    def _version_state(self, record: Record, version: Version) -> AdapterState:
        if version.digest in self._cache:
            return AdapterState.RESIDENT if self.slots.is_resident(version.digest) else AdapterState.CACHED
        if any(folder == record.folder for folder, _ in self._reads):
            return AdapterState.LOADING
        return AdapterState.FAILED if version.failure else AdapterState.REGISTERED

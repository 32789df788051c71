"""Making sure that a version is there: from what a request names to a record whose version is cached.

Owns the way of what is cold: look, read, put into the cache, register. Runs on resolver threads; what it cannot do at
once for leases of others waits in the list.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from lora_server.adapters.api import LoadedAdapter, Loader
from lora_server.adapters.books import Books
from lora_server.adapters.futures import chain_own, complete, recover, when_done
from lora_server.adapters.reads import Reading, Reads
from lora_server.adapters.registry import Record, Version
from lora_server.adapters.settling import BUSY_S, Flux, flux
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME, Signature
from lora_server.adapters.store import ContentStore, not_in_store
from lora_server.adapters.tenants import check_admitted, check_source
from lora_server.adapters.waiting import WaitingList
from lora_server.errors import (
    AdapterChangingError,
    AdapterDigestMismatchError,
    AdapterError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
    LoraServerError,
)
from lora_server.types import AdapterSource, AdapterState, AdapterUse, ByDigest, ByName, Digest, Tenants

_log = structlog.get_logger(__name__)
_ATTEMPTS = 8
"""How often a name may mean something else by the time that it is read."""
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Registration:
    """How a source is registered; all of it in the moment in which its version becomes current.

    Attributes:
        replace: Whether it may take the place of another source of its name.
        allow_partial: Whether tensors without a module are left out; None keeps what was allowed before.
        bind: Tenants it is bound to; None leaves that as it is.
        default_scale: None leaves it.
    """

    replace: bool = False
    allow_partial: bool | None = None
    bind: Tenants = None
    default_scale: float | None = None

    def reads_anew(self, source: AdapterSource) -> bool:
        """Whether files are read although they seem to be unchanged: what is replaced always helps."""
        return self.replace and not source.path.startswith(UPLOAD_SCHEME)


@dataclass(frozen=True, slots=True)
class Ensured:
    """A record whose current version is cached (or was, a moment ago)."""

    record: Record
    version: Version
    state_on_arrival: AdapterState
    load_time_s: float


class Ensurer:
    """Caches and registers what requests name. Thread-safe; blocks on the disk, never on others' leases."""

    def __init__(
        self,
        lock: threading.RLock,
        loader: Loader,
        reads: Reads,
        books: Books,
        waiting: WaitingList,
        store: ContentStore | None = None,
    ) -> None:
        """*lock* is the manager's; *store* has copies of what is pinned."""
        self._lock = lock
        self._store = store
        self._loader = loader
        self._reads = reads
        self._books = books
        self._registry = books.registry
        self._cache = books.cache
        self._waiting = waiting
        self.hits = 0

    def use(self, use: AdapterUse, tenant: str | None = None) -> Future[Ensured]:
        """Ensures what one use of a request of *tenant* names; what is bound to others is not found."""
        selector = use.selector
        if isinstance(selector, AdapterSource):
            return self.source(selector, Registration(), tenant)

        def find() -> Record:
            if isinstance(selector, ByDigest):
                return self._registry.find_version(selector.digest, tenant)
            record = self._registry.find(selector)
            check_admitted(record, tenant, selector.name if isinstance(selector, ByName) else selector.id)
            return record

        wanted = selector.digest if isinstance(selector, ByDigest) else use.expected_digest
        return self.found(find, wanted, tenant)

    def found(
        self,
        find: Callable[[], Record],
        wanted: Digest | None = None,
        tenant: str | None = None,
        attempts: int = _ATTEMPTS,
    ) -> Future[Ensured]:
        """Ensures what *find*, called with the lock held, finds by name, id or digest; as `record`.

        If that fails because another version came meanwhile, it is looked for again. What fails while its files are
        being written is served as it was before, if that is still cached.
        """
        with self._lock:
            record = find()
            before = record, record.folder, record.signature

        def otherwise(error: BaseException) -> Future[Ensured]:
            if not isinstance(error, AdapterError):
                raise error
            with self._lock:
                now = find()
                if isinstance(error, AdapterChangingError) and time.monotonic() >= now.busy_until_s:
                    now.busy_until_s = time.monotonic() + BUSY_S
                changed = (now, now.folder, now.signature) != before
            again = partial(self.found, find, wanted, tenant, attempts - 1)
            if attempts > 1 and changed:
                return self._reads.resolve(again)
            fluxes = [flux(place) for place in (now.folder, Path(now.source.path))]
            if attempts > 1 and Flux.VANISHED in fluxes:
                return self._reads.resolve(partial(self._later, again))
            if Flux.WRITTEN not in fluxes:
                raise error
            return self._as_it_was(now, wanted, error)

        try:
            ensuring = self.record(record, wanted, tenant)
        except AdapterError as error:
            return otherwise(error)
        return recover(ensuring, otherwise)

    def _later(self, again: Callable[[], Future[Ensured]]) -> Future[Ensured]:
        time.sleep(_PAUSE_S)
        return again()

    def _as_it_was(self, record: Record, wanted: Digest | None, error: AdapterError) -> Future[Ensured]:
        """A record's cached version, in place of files that are being written; raises *error* if it is not cached."""
        with self._lock:
            if wanted not in (None, record.current) or record.current not in self._cache:
                raise error
            _log.info("an adapter is being written; its last version is used", adapter=record.name, why=str(error))
            return self._found(record, record.current_version)

    def source(self, source: AdapterSource, how: Registration, tenant: str | None = None) -> Future[Ensured]:
        """Registers and caches a source for *tenant*."""

        def located(folder: Path) -> Future[Ensured]:
            return self._located(source, folder, how, tenant)

        if not source.path.startswith(HUB_SCHEME):
            return located(self._loader.locate(source.path))
        with self._lock:
            check_source(self._registry, source, None, tenant)
        fetching = self._reads.fetch(lambda: self._loader.locate(source.path))
        return chain_own(fetching, lambda folder: self._reads.resolve(lambda: located(folder)))

    def _located(self, source: AdapterSource, folder: Path, how: Registration, tenant: str | None) -> Future[Ensured]:
        with self._lock:
            self._check_place(source, folder, tenant)
        signature = self._loader.signature(folder)
        with self._lock:
            known = self._registry.tags(source, folder, replace=how.replace).record
            record = known if known is not None and known.folder == folder else None  # else it will be replaced
            state = self._state(record, folder, signature)
            allowed = how.allow_partial
            if allowed is None:
                allowed = known is not None and known.follows(source) and known.allow_partial
            suits = record is not None and (allowed or not record.is_partial) and not how.reads_anew(source)
            if record is not None and suits and record.signature == signature and record.current in self._cache:
                self._books.tag(record, source, folder)
                self._books.settle(record, how.bind, how.default_scale)
                return self._found(record, record.current_version)
            changed = record is not None and record.signature != signature
            reading = self._reads.join(folder, signature, allow_partial=allowed, changed=changed)

        def check(loaded: LoadedAdapter) -> None:
            self._check_place(source, folder, tenant)
            self._books.check_record_of(source, folder, loaded, how.replace)

        def register(loaded: LoadedAdapter) -> Record:
            installed = self._books.record_of(source, folder, loaded, how.replace)
            installed.allow_partial = allowed
            self._books.settle(installed, how.bind, how.default_scale)
            return installed

        return self._install(reading, state, check, register)

    def _check_place(self, source: AdapterSource, folder: Path, tenant: str | None) -> None:
        """Checks that *tenant* may read the source's files; with the lock held.

        What lies in the server's own store is known by its digest, never by its path: no folder of the server's would
        be kept for that. And a tenant gets only what is registered of it: not what an upload that was replaced left
        there for a moment, nor the copy of what is pinned.

        Raises:
            AdapterNotFoundError: If the source is bound to others.
            AdapterSourceForbiddenError, AdapterSourceNotFoundError: As if nothing were there.
        """
        check_source(self._registry, source, folder, tenant)
        if self._store is None or not folder.is_relative_to(self._store.resolved_root):
            return
        if not source.path.startswith(UPLOAD_SCHEME):
            raise AdapterSourceForbiddenError(source.path)
        if tenant is not None and not any(record.folder == folder for record in self._registry):
            raise not_in_store(source.path.removeprefix(UPLOAD_SCHEME))

    def record(self, record: Record, wanted: Digest | None = None, tenant: str | None = None) -> Future[Ensured]:
        """Caches a record's current version, or an older one that is *wanted* and still cached.

        If its path means another place by now, because a link was switched, its next version is read from there.
        """
        with self._lock:
            if wanted is not None and wanted != record.current and wanted in record.versions and wanted in self._cache:
                return self._found(record, record.versions[wanted])
            folder, known, again = record.folder, record.signature, self._source_of(record)
        try:
            place = self._loader.locate(str(folder) if _is_content(again.path) else again.path)
            signature = self._loader.signature(place)
        except (AdapterSourceNotFoundError, AdapterSourceForbiddenError):
            if record.stored is not None:
                return self.stored(record)
            if again.path.startswith(HUB_SCHEME):  # the download was removed
                return self.source(again, Registration(), tenant)
            raise
        if place != folder:
            return self._located(again, place, Registration(), tenant)
        with self._lock:
            state = self._state(record, folder, signature)
            if record.signature == signature and record.current in self._cache:
                return self._found(record, record.current_version)
            changed = known != signature
            if changed and time.monotonic() < record.busy_until_s:
                raise AdapterChangingError(record.name)
            reading = self._reads.join(folder, signature, allow_partial=record.allow_partial, changed=changed)

        def check(loaded: LoadedAdapter) -> None:
            live = self._registry.live(record)
            if live.folder != folder or live.signature not in (known, loaded.signature):  # another read was newer
                raise AdapterDigestMismatchError(record.name, live.current, loaded.digest)
            self._books.check_update(live, loaded)

        def register(loaded: LoadedAdapter) -> Record:
            return self._books.update(self._registry.live(record), loaded)

        when_done(reading.future, lambda done: self._note_failure(record, done))
        return self._install(reading, state, check, register)

    def stored(self, record: Record) -> Future[Ensured]:
        """Caches the version of which the server has its own copy; what its source says is looked at next time.

        Raises:
            AdapterSourceNotFoundError: If there is no such copy.
        """
        copy = record.stored
        if self._store is None or copy is None:
            raise AdapterSourceNotFoundError(record.name, "there is no copy in the server's store")
        with self._lock:
            if record.current == copy.digest and copy.digest in self._cache:
                return self._found(record, record.current_version)
            state = self._state(record, record.folder, record.signature)
        folder = self._store.place(copy.key)

        def check(loaded: LoadedAdapter) -> None:
            if loaded.digest != copy.digest:
                raise AdapterDigestMismatchError(record.name, copy.digest, loaded.digest)
            self._books.check_update(self._registry.live(record), loaded)

        def register(loaded: LoadedAdapter) -> Record:
            live = self._registry.live(record)
            if live.current == loaded.digest:  # else the source is of another version, which must be noticed
                loaded = dataclasses.replace(loaded, signature=live.signature)
            return self._books.update(live, loaded)

        reading = self._reads.join(folder, self._loader.signature(folder), allow_partial=record.allow_partial)
        when_done(reading.future, lambda done: self._note_failure(record, done))
        return self._install(reading, state, check, register)

    def state_of(self, record: Record, version: Version) -> AdapterState:
        """Where a record's version is; with the lock held."""
        if version.digest in self._cache:
            return self._cached_state(version.digest)
        if self._reads.is_reading(record.folder):
            return AdapterState.LOADING
        return AdapterState.FAILED if version.failure else AdapterState.REGISTERED

    def _install(
        self,
        reading: Reading,
        state: AdapterState,
        check: Callable[[LoadedAdapter], None],
        register: Callable[[LoadedAdapter], Record],
    ) -> Future[Ensured]:
        """Caches what is read and then registers it; waits while only leases are in the way.

        *check* and *register* run with the lock held; *check* refuses whatever *register* would, so that nobody is
        evicted for what cannot be registered.
        """
        began_s = time.monotonic()

        def install(loaded: LoadedAdapter) -> Future[Ensured]:
            load_time_s = max(time.monotonic() - began_s, 1e-6)

            def attempt() -> Ensured | None:
                self._books.expire_pins()
                check(loaded)
                if not self._cache.put({loaded.digest: (loaded.weights, loaded.weights.size_bytes)}):
                    return None
                record = register(loaded)
                return Ensured(record, record.versions[loaded.digest], state, load_time_s)

            installed: Future[Ensured] = Future()
            self._waiting.complete_when_possible(attempt, installed)
            # A pin that moved, or a version that was replaced, may be what others wait for.
            when_done(installed, lambda _: self._waiting.retry())
            return installed

        return self._reads.follow(reading, install)

    def _source_of(self, record: Record) -> AdapterSource:
        """What a record is loaded from again, under its own name and id."""
        return AdapterSource(record.source.path, id=record.ids[0], name=record.name)

    def _found(self, record: Record, version: Version) -> Future[Ensured]:
        self._cache.get(version.digest)
        self.hits += 1
        found: Future[Ensured] = Future()
        complete(found, Ensured(record, version, self._cached_state(version.digest), 0.0))
        return found

    def _note_failure(self, record: Record, done: Future[LoadedAdapter]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        with self._lock:
            record.current_version.failure = str(error) if isinstance(error, LoraServerError) else ""

    def _state(self, record: Record | None, folder: Path, signature: Signature) -> AdapterState:
        if record is not None and record.current in self._cache and record.signature == signature:
            return self._cached_state(record.current)
        return AdapterState.LOADING if self._reads.is_reading(folder, signature) else AdapterState.REGISTERED

    def _cached_state(self, digest: Digest) -> AdapterState:
        return AdapterState.RESIDENT if self._books.slots.is_resident(digest) else AdapterState.CACHED


def _is_content(path: str) -> bool:
    """Whether a source is what lies under its digest or commit, and never changes."""
    return path.startswith((UPLOAD_SCHEME, HUB_SCHEME))

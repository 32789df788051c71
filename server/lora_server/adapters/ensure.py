"""Making sure that a version is there: from what a request names to a record whose version is cached.

Owns the way of what is cold: look, read, put into the cache, register. Runs on resolver threads; what it cannot do at
once for leases of others waits in the list.
"""

from __future__ import annotations

import contextlib
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
from lora_server.adapters.books import LOADING, Books
from lora_server.adapters.drafts import Drafts
from lora_server.adapters.futures import chain_own, complete, recover, when_done
from lora_server.adapters.places import Place, place_by_name, place_on_disk, repository_of, seen_again
from lora_server.adapters.reads import Reading, Reads
from lora_server.adapters.records import Record, Standing, Version
from lora_server.adapters.refusals import nothing_at, refusal
from lora_server.adapters.roots import NoAdapterFileError
from lora_server.adapters.settling import BUSY_S, Flux, flux
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME, Signature
from lora_server.adapters.store import ContentStore
from lora_server.adapters.tenants import HubGrants
from lora_server.adapters.waiting import WaitingList
from lora_server.errors import (
    AdapterChangingError,
    AdapterDigestMismatchError,
    AdapterError,
    AdapterNotFoundError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
    LoraServerError,
    PinsExhaustedError,
)
from lora_server.types import (
    OPERATOR,
    AdapterSource,
    AdapterState,
    AdapterUse,
    ByDigest,
    Digest,
    Tenants,
    Viewer,
)

_NO_GRANT = "is not one that requests of this tenant may name; its operator may --hub-grant it"

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


def _anywhere(_: Place) -> None:
    """Admits every place."""


@dataclass(frozen=True, slots=True)
class Search:
    """How a record is looked for. Both functions are called with the lock held.

    Attributes:
        find: Finds it now.
        wanted: The version wanted; None for the current one.
        check: Refuses to use what lies at a place; the record's path may lead there by now.
    """

    find: Callable[[], Record]
    wanted: Digest | None = None
    check: Callable[[Place], None] = _anywhere


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
        grants: HubGrants | None = None,
    ) -> None:
        """*lock* is the manager's; *store* has copies of what is pinned; *grants* say who may name what of the hub."""
        self._lock = lock
        self._store = store
        self._grants = grants or HubGrants()
        self._loader = loader
        self._reads = reads
        self._books = books
        self._registry = books.registry
        self._cache = books.cache
        self._waiting = waiting
        self.hits = 0

    def use(self, use: AdapterUse, viewer: Viewer, drafts: Drafts) -> Future[Ensured]:
        """Ensures what one use of a request of *viewer* names; what is bound to others is not found."""
        selector = use.selector
        if isinstance(selector, AdapterSource):
            if not viewer.is_operator:
                self._follow_bound()
            return self._located(selector, viewer, lambda folder: self._use_of(selector, folder, viewer, drafts))

        def find() -> Record:
            if isinstance(selector, ByDigest):
                return self._registry.find_version(selector.digest, viewer)
            return self._registry.find(selector, viewer)

        def check(place: Place) -> None:
            if not self._registry.admits(place, viewer):
                raise refusal(use)

        self._look_at(find, viewer)
        wanted = selector.digest if isinstance(selector, ByDigest) else use.expected_digest
        return self.found(Search(find, wanted, check))

    def found(self, search: Search, attempts: int = _ATTEMPTS) -> Future[Ensured]:
        """Ensures what is found by name, id or digest; as `record`.

        If that fails because another version came meanwhile, it is looked for again. What fails while its files are
        being written is served as it was before, if that is still cached.
        """
        with self._lock:
            record = search.find()
            before = record, record.folder, record.signature

        def otherwise(error: BaseException) -> Future[Ensured]:
            if not isinstance(error, AdapterError):
                raise error
            with self._lock:
                now = search.find()
                if isinstance(error, AdapterChangingError) and time.monotonic() >= now.busy_until_s:
                    now.busy_until_s = time.monotonic() + BUSY_S
                changed = (now, now.folder, now.signature) != before
            again = partial(self.found, search, attempts - 1)
            if attempts > 1 and changed:
                return self._reads.resolve(again)
            if isinstance(error, AdapterNotFoundError):  # refused
                raise error
            fluxes = [flux(place) for place in (now.folder, Path(now.source.path))]
            if attempts > 1 and Flux.VANISHED in fluxes:
                return self._reads.resolve(partial(self._later, again))
            if Flux.WRITTEN not in fluxes:
                raise error
            return self._as_it_was(now, search.wanted, error)

        try:
            ensuring = self.record(record, search)
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

    def _look_at(self, find: Callable[[], Record], viewer: Viewer) -> None:
        """Looks where what *viewer* finds lies, if bindings need that and nobody has looked."""
        with self._lock:
            record = find()
            if record.place.seen or not self._registry.has_bindings:
                unseen = None
            else:
                unseen = record.source.path, record.folder, record.signature
            is_own = record.standing is not Standing.REGISTERED
        if unseen is not None:
            place = place_on_disk(*unseen)
            with self._lock:
                if (record.source.path, record.folder) == unseen[:2]:
                    self._registry.settle_at(record, place)
        if is_own and not viewer.is_operator:  # what is bound may have come to lie there since
            self._follow_bound()

    def _follow_bound(self) -> None:
        """Looks where what is bound lies now, before anybody uses or registers what may lie there, too.

        Links on the way to it may have been switched, and inodes of what was removed may be those of other files. Costs
        some stats for everything bound, with no lock held, and nothing where nothing is bound.
        """
        with self._lock:
            bound = [(each, each.source.path, each.signature, each.place) for each in self._registry.bound()]
        for record, path, signature, known in bound:
            place = seen_again(known, signature)
            if not path.startswith((UPLOAD_SCHEME, HUB_SCHEME)):
                with contextlib.suppress(AdapterError):
                    folder = self._loader.locate(path)
                    if not place.covers(folder, signature):
                        place |= place_on_disk(path, folder, self._loader.signature(folder))
            if place != known:
                with self._lock:
                    if record.place is known and record.standing is Standing.REGISTERED:
                        self._registry.settle_at(record, place)

    def load(self, source: AdapterSource, how: Registration, viewer: Viewer) -> Future[Ensured]:
        """Registers and caches a source, for an operator."""
        self._follow_bound()
        return self._located(source, OPERATOR, lambda folder: self._load_of(source, folder, how, viewer))

    def _located(
        self, source: AdapterSource, viewer: Viewer, then: Callable[[Path], Future[Ensured]]
    ) -> Future[Ensured]:
        """Finds out where a source is, and goes on from there; on a thread that may wait for a network if need be."""
        if not source.path.startswith(HUB_SCHEME):
            return then(self._locate(source, viewer))
        if not self._grants.admits(viewer.tenant, repository_of(source.path)):
            raise AdapterSourceForbiddenError(source.path, _NO_GRANT)
        fetching = self._reads.fetch(lambda: self._locate(source, viewer))
        return chain_own(fetching, lambda folder: self._reads.resolve(lambda: then(folder)))

    def _locate(self, source: AdapterSource, viewer: Viewer) -> Path:
        """Returns where a source is; what is bound to others is as good as nothing, whatever lies there."""
        try:
            folder = self._loader.locate(source.path)
        except AdapterSourceForbiddenError:
            raise
        except AdapterError as error:  # told only to whom it may be; and what is nowhere takes as long
            nowhere = error.place if isinstance(error, NoAdapterFileError) else Path(source.path)
            self._check_place(source, nowhere, place_by_name(source.path, nowhere), viewer)
            raise
        self._check_place(source, folder, place_by_name(source.path, folder), viewer)
        return folder

    def _check_place(self, source: AdapterSource, folder: Path, place: Place, viewer: Viewer) -> None:
        """Checks that *viewer* may read the source's files.

        What lies in the server's own store is known by its digest, never by its path. And a tenant gets of it only what
        is registered: not what an upload that was replaced left there for a moment, nor the copy of what is pinned.

        Raises:
            AdapterSourceNotFoundError, AdapterSourceForbiddenError: If not; as if nothing were there.
        """
        is_upload = source.path.startswith(UPLOAD_SCHEME)
        if self._store is not None and not is_upload and folder.is_relative_to(self._store.resolved_root):
            raise AdapterSourceForbiddenError(source.path)
        with self._lock:
            if not self._registry.admits(place, viewer):
                raise nothing_at(source.path)
            if is_upload and not viewer.is_operator and not self._registry.is_registered_at(folder):
                raise nothing_at(source.path)

    def _use_of(self, source: AdapterSource, folder: Path, viewer: Viewer, drafts: Drafts) -> Future[Ensured]:
        """Caches what *viewer*'s request names by a source; a new one is a draft until the request is accepted."""
        signature = self._signature_for(source, folder, viewer)
        place = place_on_disk(source.path, folder, signature)
        with self._lock:
            self._check_place(source, folder, place, viewer)
            tagged = self._registry.tags(source, folder, viewer).record
            record = tagged if tagged is not None and tagged.folder == folder else None
            state = self._state(record, folder, signature)
            allowed = tagged is not None and tagged.allow_partial
            if record is not None and record.signature == signature and record.current in self._cache:
                return self._found(record, record.current_version)
            changed = record is not None and record.signature != signature
            reading = self._reads.join(folder, signature, allow_partial=allowed, changed=changed)

        def known() -> Record | None:
            return self._registry.tags(source, folder, viewer).record

        def check(loaded: LoadedAdapter) -> None:
            self._check_place(source, folder, place, viewer)
            if (record := known()) is not None:
                self._check_update(record, loaded)

        def register(loaded: LoadedAdapter) -> Record:
            record = known()
            if record is not None:
                self._books.update(record, loaded, place)
                self._books.move(record, source, folder, place)
                return record
            draft = self._books.draft(source, place, folder, loaded, viewer)
            drafts.add(draft)
            return draft

        return self._install(reading, state, check, register)

    def _signature_for(self, source: AdapterSource, folder: Path, viewer: Viewer) -> Signature:
        """That of the loader. Where there are bindings, a folder that is no adapter is as good as none for a tenant.

        Else a folder that cannot be used because something in it is bound could be told from one that is none.
        """
        try:
            return self._loader.signature(folder)
        except AdapterError:
            if viewer.is_operator or not self._registry.has_bindings:
                raise
            raise nothing_at(source.path) from None

    def _load_of(self, source: AdapterSource, folder: Path, how: Registration, viewer: Viewer) -> Future[Ensured]:
        signature = self._loader.signature(folder)
        place = place_on_disk(source.path, folder, signature)
        with self._lock:
            known = self._registry.tags(source, folder, LOADING, replace=how.replace).record
            if known is None:
                known = self._registry.own_at(source, folder, viewer)
            record = known if known is not None and known.folder == folder else None  # else it will be replaced
            state = self._state(record, folder, signature)
            allowed = how.allow_partial
            if allowed is None:
                allowed = known is not None and known.follows(source) and known.allow_partial
            suits = record is not None and (allowed or not record.is_partial) and not how.reads_anew(source)
            if record is not None and suits and record.signature == signature and record.current in self._cache:
                self._books.promote(record)
                self._registry.settle_at(record, place)
                self._books.tag(record, source, folder)
                self._books.settle(record, how.bind, how.default_scale)
                return self._found(record, record.current_version)
            changed = record is not None and record.signature != signature
            reading = self._reads.join(folder, signature, allow_partial=allowed, changed=changed)

        def check(loaded: LoadedAdapter) -> None:
            self._books.check_record_of(source, folder, loaded, how.replace)

        def register(loaded: LoadedAdapter) -> Record:
            self._take_over(source, folder, how, viewer)
            installed = self._books.record_of(source, place, folder, loaded, how.replace)
            installed.allow_partial = allowed
            self._books.settle(installed, how.bind, how.default_scale)
            return installed

        return self._install(reading, state, check, register)

    def _take_over(self, source: AdapterSource, folder: Path, how: Registration, viewer: Viewer) -> None:
        """Lets what the operator's own requests have named so become what is registered."""
        own = self._registry.own_at(source, folder, viewer)
        if own is not None and self._registry.tags(source, folder, LOADING, replace=how.replace).record is None:
            self._books.promote(own)

    def record(self, record: Record, search: Search | None = None) -> Future[Ensured]:
        """Caches a record's current version, or an older one that *search* wants and that is still cached.

        If its path means another place by now, because a link was switched, its next version is read from there, if
        *search* admits that.
        """
        wanted = search.wanted if search is not None else None
        with self._lock:
            if wanted is not None and wanted != record.current and wanted in record.versions and wanted in self._cache:
                return self._found(record, record.versions[wanted])
            folder, known, path = record.folder, record.signature, record.source.path
        try:
            there = self._loader.locate(folder if path.startswith((UPLOAD_SCHEME, HUB_SCHEME)) else path)
            if there != folder:
                return self._moved(record, folder, there, search)
            signature = self._loader.signature(folder)
        except (AdapterSourceNotFoundError, AdapterSourceForbiddenError):
            if record.stored is not None:
                return self.stored(record)
            if path.startswith(HUB_SCHEME):  # the download was removed
                return self._fetched(record, folder)
            raise
        changed = known != signature
        if changed:  # one of its files may be a link that was switched
            self._admit(search, place_on_disk(path, folder, signature))
        with self._lock:
            state = self._state(record, folder, signature)
            if record.signature == signature and record.current in self._cache:
                return self._found(record, record.current_version)
            if changed and time.monotonic() < record.busy_until_s:
                raise AdapterChangingError(record.name)
            reading = self._reads.join(folder, signature, allow_partial=record.allow_partial, changed=changed)
        place = place_on_disk(path, folder, signature)

        def check(loaded: LoadedAdapter) -> None:
            live = self._registry.live(record)
            if live.folder != folder or live.signature not in (known, loaded.signature):  # another read was newer
                raise AdapterDigestMismatchError(record.name, live.current, loaded.digest)
            self._check_update(live, loaded)

        def register(loaded: LoadedAdapter) -> Record:
            return self._books.update(self._registry.live(record), loaded, place)

        when_done(reading.future, lambda done: self._note_failure(record, done))
        return self._install(reading, state, check, register)

    def _fetched(self, record: Record, folder: Path) -> Future[Ensured]:
        """The same of an adapter of the hub whose download was removed: its branch may mean another commit by now."""
        source = AdapterSource(record.source.path, name=record.name)
        return self._located(source, OPERATOR, lambda there: self._moved(record, folder, there))

    def _moved(self, record: Record, folder: Path, there: Path, search: Search | None = None) -> Future[Ensured]:
        """The same of a record whose path led to *folder* and leads *there* now."""
        source = AdapterSource(record.source.path)
        self._admit(search, place_by_name(source.path, there))
        signature = self._loader.signature(there)
        place = place_on_disk(source.path, there, signature)
        self._admit(search, place)
        with self._lock:
            state = self._state(None, there, signature)
            reading = self._reads.join(there, signature, allow_partial=record.allow_partial)

        def check(loaded: LoadedAdapter) -> None:
            live = self._registry.live(record)
            if live.folder != folder and (live.folder, live.signature) != (there, loaded.signature):
                raise AdapterDigestMismatchError(record.name, live.current, loaded.digest)  # it went on meanwhile
            self._check_update(live, loaded)

        def register(loaded: LoadedAdapter) -> Record:
            live = self._books.update(self._registry.live(record), loaded, place)
            self._books.move(live, source, there, place)
            return live

        when_done(reading.future, lambda done: self._note_failure(record, done))
        return self._install(reading, state, check, register)

    def _admit(self, search: Search | None, place: Place) -> None:
        if search is not None:
            with self._lock:
                search.check(place)

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
            self._check_update(self._registry.live(record), loaded)

        def register(loaded: LoadedAdapter) -> Record:
            live = self._registry.live(record)
            if live.current == loaded.digest:  # else the source is of another version, which must be noticed
                loaded = dataclasses.replace(loaded, signature=live.signature)
            return self._books.update(live, loaded)

        reading = self._reads.join(folder, self._loader.signature(folder), allow_partial=record.allow_partial)
        when_done(reading.future, lambda done: self._note_failure(record, done))
        return self._install(reading, state, check, register)

    def _check_update(self, record: Record, loaded: LoadedAdapter) -> None:
        """As that of the books, but tells nobody what is pinned: the names are perhaps of others."""
        try:
            self._books.check_update(record, loaded)
        except PinsExhaustedError as error:
            raise error.without_names() from None

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

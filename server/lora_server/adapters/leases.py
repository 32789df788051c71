"""Leases: a request's hold on its versions, all of them or none.

Owns the way from digests to a lease: what was evicted is read again, what others' leases block waits in the list.
Knows nothing of names or scales.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from lora_server.adapters.api import AdapterLease, LoadedAdapter, Loader, Weights
from lora_server.adapters.books import Books
from lora_server.adapters.futures import chain_own, gather
from lora_server.adapters.reads import Reads
from lora_server.adapters.records import Record, Standing
from lora_server.adapters.waiting import WaitingList
from lora_server.errors import AdapterDigestMismatchError, LoraServerError
from lora_server.types import Digest

Wanted = Mapping[Digest, Record]
"""Versions, each with the record by which it was found."""
_Note = Callable[[], None]


class Leases:
    """Gives leases and takes them back. Thread-safe; no method blocks."""

    def __init__(self, lock: threading.RLock, loader: Loader, reads: Reads, books: Books, waiting: WaitingList) -> None:
        """*lock* is the manager's; *waiting* is retried when a lease ends."""
        self._lock = lock
        self._loader = loader
        self._reads = reads
        self._books = books
        self._waiting = waiting

    def acquire(self, wanted: Wanted, note: _Note = lambda: None) -> Future[AdapterLease]:
        """Leases all *wanted*; see `AdapterManager.acquire`.

        *note* runs with the lock held, in the moment in which the lease is taken; what it raises fails the future.
        """
        return self._acquire(wanted, {}, note)

    def _acquire(self, wanted: Wanted, held: Mapping[Digest, Weights], note: _Note) -> Future[AdapterLease]:
        """Leases *wanted*, of which *held* are in hand; reads what is neither there nor cached, and looks again."""
        with self._lock:  # to the end: between looking and taking, nobody may evict
            missing = [digest for digest in wanted if digest not in self._books.cache and digest not in held]
            if not missing:
                return self._take(wanted, held, note)
        reads = gather([self._reads.resolve(partial(self._reread, digest, wanted[digest])) for digest in missing])

        def again(loaded: Sequence[LoadedAdapter]) -> Future[AdapterLease]:
            return self._acquire(wanted, {**held, **{each.digest: each.weights for each in loaded}}, note)

        return chain_own(reads, again, undo=AdapterLease.release)

    def _take(self, wanted: Wanted, held: Mapping[Digest, Weights], note: _Note) -> Future[AdapterLease]:
        """Leases what is cached or held, now or when leases of others end."""
        leased: Future[AdapterLease] = Future()
        in_hand = dict(held)
        cache = self._books.cache

        def attempt() -> AdapterLease | None:
            self._books.expire_pins()
            for digest in wanted:  # keep what is cached now, in case it is evicted while this waits
                cached = cache.get(digest)
                if cached is not None:
                    in_hand[digest] = cached
            if not cache.put({digest: (in_hand[digest], in_hand[digest].size_bytes) for digest in wanted}):
                return None
            try:
                note()
            except LoraServerError:
                self._forget(wanted)
                raise
            weights = {digest: cache.lease(digest) for digest in wanted}
            self._forget(wanted)  # unloaded meanwhile: it goes with this lease
            return AdapterLease(weights, lambda: self._release(tuple(wanted)))

        self._waiting.complete_when_possible(attempt, leased, undo=AdapterLease.release)
        return leased

    def _forget(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._books.forget(digest)

    def _release(self, digests: Sequence[Digest]) -> None:
        with self._lock:
            for digest in digests:
                self._books.release(digest)
        self._waiting.retry()

    def _reread(self, digest: Digest, found: Record) -> Future[LoadedAdapter]:
        """Reads a known version again, from where it was found; on a resolver thread."""
        with self._lock:
            record = found if found.standing is Standing.FORGOTTEN else self._live(found, digest)
        signature = self._loader.signature(self._loader.locate(record.folder))

        def check(loaded: LoadedAdapter) -> LoadedAdapter:
            if loaded.digest != digest:
                raise AdapterDigestMismatchError(record.name, digest, loaded.digest)
            return loaded

        changed = record.signature != signature
        reading = self._reads.join(record.folder, signature, allow_partial=record.allow_partial, changed=changed)
        return self._reads.follow(reading, check)

    def _live(self, found: Record, digest: Digest) -> Record:
        record = self._books.registry.live(found)
        if digest not in record.versions:
            raise AdapterDigestMismatchError(record.name, digest, record.current)
        return record

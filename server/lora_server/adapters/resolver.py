"""From what a request names to versions: each use is ensured, all are checked together, then all is accepted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from lora_server.adapters.api import ResolvedAdapter
from lora_server.adapters.books import Books
from lora_server.adapters.drafts import Drafts
from lora_server.adapters.ensure import Ensured, Ensurer
from lora_server.adapters.futures import chain_own, done, gather, when_done
from lora_server.adapters.reads import Reads
from lora_server.adapters.records import Record, Standing
from lora_server.adapters.refusals import refusal
from lora_server.adapters.uses import check_uses
from lora_server.adapters.waiting import WaitingList
from lora_server.errors import AdapterDigestMismatchError, FieldFault, InvalidRequestError, LoraServerError
from lora_server.types import AdapterSource, AdapterUse, AppliedAdapter, ByDigest, Digest, Viewer


class Resolver:
    """Fixes uses to versions. Thread-safe; no method blocks."""

    def __init__(
        self, lock: threading.RLock, ensurer: Ensurer, reads: Reads, books: Books, waiting: WaitingList
    ) -> None:
        """*lock* is the manager's; *waiting* is retried when a refused request lets something go."""
        self._lock = lock
        self._ensurer = ensurer
        self._reads = reads
        self._books = books
        self._registry = books.registry
        self._cache = books.cache
        self._waiting = waiting

    def resolve(self, uses: Sequence[AdapterUse], tenant: str | None) -> Future[tuple[ResolvedAdapter, ...]]:
        """See `AdapterManager.resolve`."""
        if not uses:
            return done(())
        viewer = Viewer(tenant, is_operator=tenant is None)
        drafts = Drafts(self._books)
        ensured = gather([self._reads.resolve(partial(self._ensurer.use, use, viewer, drafts)) for use in uses])
        resolved = chain_own(ensured, lambda found: self._resolved(uses, found, viewer))
        when_done(resolved, lambda _: self._close(drafts))
        return resolved

    def _close(self, drafts: Drafts) -> None:
        with self._lock:
            forgotten = drafts.close()
        if forgotten:
            self._waiting.retry()

    def _resolved(
        self, uses: Sequence[AdapterUse], found: Sequence[Ensured], viewer: Viewer
    ) -> tuple[ResolvedAdapter, ...]:
        """Checks the uses against one another and against what they expect, and once more that *viewer* may."""
        with self._lock:
            self._check_found(uses, found, viewer)
        places = _places(uses, found)
        check_uses(uses, [(ensured.record.name, ensured.version) for ensured in found])
        with self._lock:
            self._check_found(uses, found, viewer)
            self._books.expire_pins()
            loose = [e.version.size_bytes for e in found if e.version.digest not in self._cache]
            self._cache.check_fits(sum(loose), len(loose), kept=places)
            records = self._accept(uses, found, viewer)
            return tuple(
                self._resolved_one(use, ensured, record, viewer)
                for use, ensured, record in zip(uses, found, records, strict=True)
            )

    def _check_found(self, uses: Sequence[AdapterUse], found: Sequence[Ensured], viewer: Viewer) -> None:
        """Checks that *viewer* may use what was found: a binding may have changed while something was read."""
        for use, ensured in zip(uses, found, strict=True):
            if not self._registry.still_finds(ensured.record, viewer):
                raise refusal(use)

    def _accept(self, uses: Sequence[AdapterUse], found: Sequence[Ensured], viewer: Viewer) -> Sequence[Record]:
        """Lets *viewer* find what its request has named by sources; all of it, or nothing."""
        accepted = []
        drafts = [ensured.record for ensured in found if ensured.record.standing is Standing.DRAFT]
        try:
            for use, ensured in zip(uses, found, strict=True):
                record = ensured.record
                if isinstance(use.selector, AdapterSource):
                    record = self._books.accept(record, use.selector, viewer)
                accepted.append(record)
        except LoraServerError:
            for record in drafts:
                if record.standing is Standing.ON_DEMAND:
                    self._books.drop(record)
            raise
        return accepted

    def _resolved_one(self, use: AdapterUse, ensured: Ensured, record: Record, viewer: Viewer) -> ResolvedAdapter:
        version = ensured.version
        scale = record.default_scale if use.scale is None else use.scale
        on_demand = record.standing is not Standing.REGISTERED
        applied = AppliedAdapter(record.name, record.ids[0], version.digest, scale, use.settings, on_demand)
        words = version.trigger_words if use.settings.use_trigger_words else ()
        return ResolvedAdapter(
            applied, ensured.state_on_arrival, ensured.load_time_s, version.size_bytes, words, record, viewer
        )


def _places(uses: Sequence[AdapterUse], found: Sequence[Ensured]) -> dict[Digest, int]:
    """Returns which use each version is of; raises if one is not the version expected, or is there twice."""
    places: dict[Digest, int] = {}
    for place, (use, ensured) in enumerate(zip(uses, found, strict=True)):
        digest = ensured.version.digest
        expected = use.selector.digest if isinstance(use.selector, ByDigest) else use.expected_digest
        if expected is not None and expected != digest:
            raise AdapterDigestMismatchError(ensured.record.name, expected, digest)
        if digest in places:
            detail = f"is the adapter of spec.adapters[{places[digest]}] again"
            raise InvalidRequestError([FieldFault(f"spec.adapters[{place}]", detail)])
        places[digest] = place
    return places

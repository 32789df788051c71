"""The books of the manager: what happens to records, versions and pins when something was read, pinned or forgotten.

Every method runs with the manager's lock held and never blocks. Registry, cache and slots are changed together here, or
not at all.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_server.adapters.api import LoadedAdapter, ResolvedAdapter, Weights
from lora_server.adapters.cache import AdapterCache
from lora_server.adapters.naming import stable_adapter_id
from lora_server.adapters.places import Place, place_on_disk
from lora_server.adapters.records import Record, Standing, StoredCopy, Version
from lora_server.adapters.registry import Registry
from lora_server.adapters.slots import SlotTable
from lora_server.errors import CacheExhaustedError
from lora_server.types import AdapterSource, AdapterState, AppliedAdapter, Digest, PinInfo, PinLevel, Tenants, Viewer

LOADING = Viewer(has_own=False)
"""As whom operators register: everything registered counts, and nothing that requests have named."""


@dataclass(slots=True)
class Books:
    """Registry, host cache and slots, kept in step.

    Attributes:
        clock: Unix time in seconds.
        on_device_pin: Told, without blocking, of every version that is to be brought to the device for good.
        on_forgotten: Told, without blocking, that a version may have lost its slot.
        on_change: Told, without blocking, of every name whose record has changed in what survives a restart.
        on_stale_copy: Told, without blocking, of a pinned record whose copy in the store is of an older version.
    """

    registry: Registry
    cache: AdapterCache[Weights]
    slots: SlotTable
    clock: Callable[[], float]
    on_device_pin: Callable[[ResolvedAdapter], None] = lambda _: None
    on_forgotten: Callable[[], None] = lambda: None
    on_change: Callable[[str], None] = lambda _: None
    on_stale_copy: Callable[[Record], None] = lambda _: None
    _pin_ends: list[tuple[float, str]] = field(default_factory=list)

    def restore(self, record: Record) -> None:
        """Registers what an earlier process left, its pin to be satisfied yet; looks at the disk for what is bound."""
        if record.tenants is not None:
            record.place = place_on_disk(record.source.path, record.folder, record.signature)
        self.registry.add(record)
        self._note_end(record)

    def check_record_of(self, source: AdapterSource, folder: Path, loaded: LoadedAdapter, replace: bool) -> None:
        """Checks that `record_of` would succeed; changes nothing, and raises what it would."""
        record = self.registry.tags(source, folder, LOADING, replace=replace).record
        if record is not None:
            self.check_update(record, loaded)

    def check_update(self, record: Record, loaded: LoadedAdapter) -> None:
        """Checks that a record's pin could move to what was read; CacheExhaustedError, nothing changed, if not."""
        if record.pin is None or record.current == loaded.digest:
            return
        size_bytes = loaded.weights.size_bytes
        self.cache.check_pin(loaded.digest, record.name, size_bytes=size_bytes, replacing=record.current)
        if record.pin.level is PinLevel.DEVICE:
            self.slots.check_move(record.current, loaded.digest, record.name)

    def record_of(
        self, source: AdapterSource, place: Place, folder: Path, loaded: LoadedAdapter, replace: bool
    ) -> Record:
        """The record of a source that has just been cached: a new one, an updated one, or one in another's place."""
        tags = self.registry.tags(source, folder, LOADING, replace=replace)
        record = tags.record
        if record is not None and (record.folder == folder or record.follows(source)):
            self.tag(record, source, folder)
            self.update(record, loaded, place)
            self.move(record, source, folder, place)
            return record
        assert tags.id is not None
        new = self._new_record(tags.name, tags.id, source, folder, loaded)
        new.place, new.tenants = place, self.registry.inherited(place)
        if record is not None:
            new.default_scale, new.lost_pin, new.tenants = record.default_scale, record.lost_pin, record.tenants
            self._move_pin(record, new, new.current)
            self.registry.remove(record)
        self.registry.add(new)
        self.on_change(new.name)
        self._note_end(new)
        if new.pin is not None and new.pin.level is PinLevel.DEVICE:
            self._bring_to_device(new)
        for digest in record.versions if record is not None else ():
            self.forget(digest)
        return new

    def draft(self, source: AdapterSource, place: Place, folder: Path, loaded: LoadedAdapter, viewer: Viewer) -> Record:
        """A record of what a request of *viewer* has read: cached, and found by nobody yet."""
        tags = self.registry.tags(source, folder, viewer)
        adapter_id = tags.id if tags.id is not None else stable_adapter_id(source.path)
        draft = self._new_record(tags.name, adapter_id, source, folder, loaded)
        draft.place, draft.owner, draft.standing = place, viewer.tenant, Standing.DRAFT
        self.registry.draft(draft)
        return draft

    def accept(self, record: Record, source: AdapterSource, viewer: Viewer) -> Record:
        """Lets *viewer* find, by the tags of *source*, what its request has read; returns what it is called by now.

        Raises:
            AdapterAlreadyExistsError: If the name or id means something else by now; nothing is changed.
        """
        tags = self.registry.tags(source, record.folder, viewer)
        known = record if record.standing is not Standing.DRAFT else tags.record
        if known is not None and (known is not tags.record or record.current not in known.versions):
            return record  # changed meanwhile: this request goes on with what it has, under no name
        if known is None:
            assert tags.id is not None
            record.name, record.ids = tags.name, [tags.id]
            for surplus in self.registry.keep(record):
                self.drop(surplus)
            return record
        if tags.id is not None:
            self.registry.add_id(known, tags.id, viewer)
        return known

    def promote(self, record: Record) -> None:
        """Registers what a tenant's request has named, for everybody whom it is not bound to others for."""
        if record.standing is Standing.ON_DEMAND:
            self.registry.promote(record)
            self.registry.bind(record, self.registry.inherited(record.place))
            self.on_change(record.name)

    def drop(self, record: Record) -> None:
        """Forgets what requests have made: nobody finds it any more, and whoever has it may still draw with it."""
        self.remove(record)
        record.standing = Standing.FORGOTTEN

    def remove(self, record: Record) -> int:
        """Forgets a record, and its versions that no other knows; returns the bytes freed now."""
        is_registered = record.standing is Standing.REGISTERED
        self.registry.remove(record)
        if is_registered:
            self.on_change(record.name)
        return sum(self.forget(digest) for digest in record.versions)

    def move(self, record: Record, source: AdapterSource, folder: Path, place: Place) -> None:
        """Notes that a record's files lie elsewhere from now on, if they do."""
        if record.folder != folder:
            self.registry.move(record, source, folder)
            self.registry.settle_at(record, place)
            self._changed(record)

    def tag(self, record: Record, source: AdapterSource, folder: Path) -> None:
        """Gives a registered record the id of one more source of its folder, unless it has it."""
        adapter_id = self.registry.tags(source, folder, LOADING).id
        if adapter_id is not None:
            self.registry.add_id(record, adapter_id, LOADING)
            self.on_change(record.name)

    def update(self, record: Record, loaded: LoadedAdapter, place: Place | None = None) -> Record:
        """Makes what was read, and is cached, the record's current version; its pin moves along.

        Raises:
            CacheExhaustedError: As `check_update`; nothing is changed.
        """
        if record.current != loaded.digest:
            self._move_pin(record, record, loaded.digest)
        version, old = self._new_version(loaded), record.versions.get(loaded.digest)
        version.last_use_time_s = old.last_use_time_s if old else None
        self.registry.set_version(record, version)
        record.signature = loaded.signature
        if place is not None:
            self.registry.settle_at(record, place)
        self._changed(record)
        if record.lost_pin is not None:
            with contextlib.suppress(CacheExhaustedError):
                self.set_pin(record, record.lost_pin)
        if record.pin is not None and record.pin.level is PinLevel.DEVICE:
            self._bring_to_device(record)
        for digest in [d for d in record.versions if d != record.current and d not in self.cache]:
            self.registry.drop_version(record, digest)
            self.forget(digest)
        if record.stored is not None and record.stored.digest != record.current:
            self.on_stale_copy(record)
        return record

    def settle(self, record: Record, tenants: Tenants, default_scale: float | None) -> None:
        """Binds *record* to *tenants*, none of them is everybody, and sets its scale; None leaves either."""
        if tenants is not None:
            self.registry.bind(record, tenants or None)
        if default_scale is not None:
            record.default_scale = default_scale
        if tenants is not None or default_scale is not None:
            self.on_change(record.name)

    def _changed(self, record: Record) -> None:
        if record.standing is Standing.REGISTERED:
            self.on_change(record.name)

    def _new_record(
        self, name: str, adapter_id: int, source: AdapterSource, folder: Path, loaded: LoadedAdapter
    ) -> Record:
        return Record(
            name=name,
            source=AdapterSource(source.path),
            folder=folder,
            signature=loaded.signature,
            versions={loaded.digest: self._new_version(loaded)},
            current=loaded.digest,
            ids=[adapter_id],
        )

    def _new_version(self, loaded: LoadedAdapter) -> Version:
        weights = loaded.weights
        return Version(
            loaded.digest,
            weights.size_bytes,
            weights.rank,
            weights.components,
            self.clock(),
            modules=loaded.modules,
            trigger_words=loaded.report.trigger_words if loaded.report is not None else (),
            report=loaded.report,
        )

    def _move_pin(self, old: Record, new: Record, digest: Digest) -> None:
        """Lets the pin of *old*'s current version go over to *digest*, for *new*, which has the same name."""
        if old.pin is None:
            return
        if old.current != digest:
            self.cache.check_pin(digest, old.name, replacing=old.current)
        if old.pin.level is PinLevel.DEVICE:
            self.slots.move_pin(old.current, digest, old.name)
        if old.current != digest:  # the old one first: both together may be more than pins may take
            self.cache.unpin(old.current, old.name)
            self.cache.pin(digest, old.name)
        new.pin = old.pin
        if old is not new:
            old.pin = None

    def check_pin(self, record: Record) -> None:
        """Checks, before anything is loaded or evicted for it, that pins may take the record's current version."""
        self.expire_pins()
        self.cache.check_pin(record.current, record.name, size_bytes=record.current_version.size_bytes)

    def set_pin(self, record: Record, pin: PinInfo, stored: StoredCopy | None = None) -> None:
        """Pins a record's cached version; PinsExhaustedError, nothing changed, if pins may not take so much."""
        self.expire_pins()
        self.cache.check_pin(record.current, record.name)
        if pin.level is PinLevel.DEVICE:
            self.slots.pin(record.current, record.name)
            self._bring_to_device(record)
        else:
            self.slots.unpin(record.current, record.name)
        self.cache.pin(record.current, record.name)
        record.pin, record.lost_pin, record.stored = pin, None, stored or record.stored
        self._note_end(record)
        self.on_change(record.name)

    def set_stored(self, record: Record, copy: StoredCopy) -> None:
        """Notes the server's own copy of a pinned record's current version."""
        record.stored = copy
        self.on_change(record.name)

    def _bring_to_device(self, record: Record) -> None:
        applied = AppliedAdapter(record.name, record.ids[0], record.current, record.default_scale)
        size_bytes = record.current_version.size_bytes
        self.on_device_pin(ResolvedAdapter(applied, AdapterState.CACHED, 0.0, size_bytes, found=record))

    def watch_device_pins(self, on_pin: Callable[[ResolvedAdapter], None]) -> None:
        """Tells *on_pin* of every pin to the device, from those that there are on."""
        self.on_device_pin = on_pin
        for record in self.registry:
            if record.pin is not None and record.pin.level is PinLevel.DEVICE:
                self._bring_to_device(record)

    def clear_pin(self, record: Record) -> None:
        """Ends a record's pin; idempotent."""
        if (record.pin, record.lost_pin, record.stored) != (None, None, None):
            self.on_change(record.name)
        record.pin = record.lost_pin = record.stored = None
        self.slots.unpin(record.current, record.name)
        self.cache.unpin(record.current, record.name)

    def expire_pins(self) -> None:
        """Ends the pins whose time has come."""
        now_s = self.clock()
        while self._pin_ends and self._pin_ends[0][0] <= now_s:
            record = self.registry.get(heapq.heappop(self._pin_ends)[1])
            pin = None if record is None else record.pin or record.lost_pin
            if record is not None and pin is not None and pin.expire_time_s is not None and pin.expire_time_s <= now_s:
                self.clear_pin(record)

    def next_pin_end_s(self) -> float | None:
        """Unix time before which no pin ends; None if none does."""
        return self._pin_ends[0][0] if self._pin_ends else None

    def _note_end(self, record: Record) -> None:
        """A pin belongs to a name, so that it need not be noted again when it goes over to another record of it."""
        pin = record.pin or record.lost_pin
        if pin is not None and pin.expire_time_s is not None:
            heapq.heappush(self._pin_ends, (pin.expire_time_s, record.name))

    def forget(self, digest: Digest) -> int:
        """Lets a version go that no record knows, or does nothing; what is used goes with its last user.

        Returns the bytes freed now.
        """
        if self.registry.uses(digest):
            return 0
        if self.slots.forget(digest):
            self.on_forgotten()
        return self.cache.remove(digest)

    def release(self, digest: Digest) -> None:
        """Takes back one lease; an unloaded version's slot goes with its last, as its bytes do."""
        if self.cache.release(digest):
            self.slots.forget(digest)
            self.on_forgotten()

    def check_integrity(self) -> None:
        """Recomputes the books of every part, and of what they say about one another; AssertionError if wrong."""
        self.cache.check_integrity()
        self.slots.check_integrity()
        self.registry.check_integrity()
        host_pins, device_pins = set(), set()
        for record in self.registry:
            assert record.current in record.versions
            if record.pin is not None:
                host_pins.add((record.current, record.name))
                if record.pin.level is PinLevel.DEVICE:
                    device_pins.add((record.current, record.name))
        assert host_pins == {(digest, owner) for digest in self.cache for owner in self.cache.owners(digest)}
        assert device_pins == {(d, owner) for d in self.slots.pinned() for owner in self.slots.owners(d)}
        orphans = [d for d in {*self.cache, *self.slots.resident()} if not self.registry.uses(d)]
        assert all(self.cache.is_doomed(d) or self.slots.is_doomed(d) for d in orphans), "kept, and nobody's"

    def note_use(self, digest: Digest, record: Record, viewer: Viewer) -> None:
        """Notes that *viewer*'s request leases a version now, of the record by which it has found it."""
        self.registry.touch(record, viewer)
        if digest in record.versions:
            record.versions[digest].last_use_time_s = self.clock()

"""The books of the manager: what happens to records, versions and pins when something was read, pinned or forgotten.

Every method runs with the manager's lock held and never blocks. Registry, cache and slots are changed together here, or
not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_server.adapters.api import LoadedAdapter, ResolvedAdapter, Weights
from lora_server.adapters.cache import AdapterCache
from lora_server.adapters.registry import Record, Registry, Version
from lora_server.adapters.slots import SlotTable
from lora_server.adapters.tenants import inherited
from lora_server.errors import LoraServerError
from lora_server.types import AdapterSource, AdapterState, AppliedAdapter, Digest, PinInfo, PinLevel


@dataclass(slots=True)
class Books:
    """Registry, host cache and slots, kept in step.

    Attributes:
        clock: Unix time in seconds.
        on_device_pin: Told, without blocking, of every version that is to be brought to the device for good.
    """

    registry: Registry
    cache: AdapterCache[Weights]
    slots: SlotTable
    clock: Callable[[], float]
    on_device_pin: Callable[[ResolvedAdapter], None] = lambda _: None

    def record_of(self, source: AdapterSource, folder: Path, loaded: LoadedAdapter, replace: bool) -> Record:
        """The record of a source that has just been cached: a new one, an updated one, or one in another's place."""
        tags = self.registry.tags(source, folder, replace=replace)
        record = tags.record
        if record is not None and record.folder == folder:
            self.tag(record, source, folder)
            return self.update(record, loaded)
        assert tags.id is not None
        new = Record(
            name=tags.name,
            source=AdapterSource(source.path),
            folder=folder,
            signature=loaded.signature,
            versions={loaded.digest: self._new_version(loaded)},
            current=loaded.digest,
            ids=[tags.id],
        )
        new.tenants = inherited(self.registry, folder)
        if record is not None:
            new.default_scale, new.tenants = record.default_scale, record.tenants
            self._move_pin(record, new)
            self.registry.remove(record)
        self.registry.add(new)
        for digest in record.versions if record is not None else ():
            self.forget(digest)
        return new

    def tag(self, record: Record, source: AdapterSource, folder: Path) -> None:
        """Gives a record the id of one more source of its folder, unless it has it."""
        adapter_id = self.registry.tags(source, folder, replace=False).id
        if adapter_id is not None:
            self.registry.add_id(record, adapter_id)

    def update(self, record: Record, loaded: LoadedAdapter) -> Record:
        """Makes what was read the record's current version; a pin moves first, and may refuse."""
        version = self._new_version(loaded)
        old = record.versions.get(loaded.digest)
        version.last_use_time_s = old.last_use_time_s if old else None
        previous, record.versions = (
            record.versions,
            {
                **{digest: each for digest, each in record.versions.items() if digest != loaded.digest},
                loaded.digest: version,
            },
        )
        before, record.current = record.current, loaded.digest
        try:
            if before != loaded.digest:
                self._repin(record, before)
        except LoraServerError:
            record.versions, record.current = previous, before
            raise
        record.signature = loaded.signature
        for digest in [d for d in record.versions if d != record.current and d not in self.cache]:
            del record.versions[digest]
        return record

    def _new_version(self, loaded: LoadedAdapter) -> Version:
        weights = loaded.weights
        return Version(
            loaded.digest,
            weights.size_bytes,
            weights.rank,
            weights.components,
            self.clock(),
            modules=loaded.modules,
            trigger_words=loaded.trigger_words,
        )

    def _repin(self, record: Record, before: Digest) -> None:
        if record.pin is None:
            return
        self.cache.check_pin(record.current, record.name, replacing=before)
        if record.pin.level is PinLevel.DEVICE:
            self.slots.unpin(before, record.name)
            try:
                self._pin_on_device(record)
            except LoraServerError:
                self.slots.pin(before, record.name)
                raise
        self.cache.unpin(before, record.name)
        self.cache.pin(record.current, record.name)

    def _move_pin(self, old: Record, new: Record) -> None:
        new.pin = old.pin
        if old.current != new.current:
            self._repin(new, old.current)
        old.pin = None

    def check_pin(self, record: Record) -> None:
        """Checks, before anything is loaded or evicted for it, that pins may take the record's current version."""
        self.expire_pins()
        self.cache.check_pin(record.current, record.name, size_bytes=record.current_version.size_bytes)

    def set_pin(self, record: Record, pin: PinInfo) -> None:
        """Pins a record's cached version; PinsExhaustedError, nothing changed, if pins may not take so much."""
        self.expire_pins()
        self.cache.check_pin(record.current, record.name)
        if pin.level is PinLevel.DEVICE:
            self._pin_on_device(record)
        else:
            self.slots.unpin(record.current, record.name)
        self.cache.pin(record.current, record.name)
        record.pin = pin

    def _pin_on_device(self, record: Record) -> None:
        self.slots.pin(record.current, record.name)
        self._tell_device_pin(record)

    def watch_device_pins(self, on_pin: Callable[[ResolvedAdapter], None]) -> None:
        """Tells *on_pin* of every pin to the device, from those that there are on."""
        self.on_device_pin = on_pin
        for record in self.registry:
            if record.pin is not None and record.pin.level is PinLevel.DEVICE:
                self._tell_device_pin(record)

    def _tell_device_pin(self, record: Record) -> None:
        applied = AppliedAdapter(record.name, record.ids[0], record.current, record.default_scale)
        size_bytes = record.current_version.size_bytes
        self.on_device_pin(ResolvedAdapter(applied, AdapterState.CACHED, 0.0, size_bytes))

    def clear_pin(self, record: Record) -> None:
        """Ends a record's pin; idempotent."""
        record.pin = None
        self.slots.unpin(record.current, record.name)
        self.cache.unpin(record.current, record.name)

    def expire_pins(self) -> None:
        """Ends the pins whose time has come."""
        now_s = self.clock()
        for record in self.registry:
            if record.pin is not None and record.pin.expire_time_s is not None and record.pin.expire_time_s <= now_s:
                self.clear_pin(record)

    def forget(self, digest: Digest) -> int:
        """Lets a version go that no record knows any more; returns the bytes freed now."""
        if self.registry.uses(digest):
            return 0
        self.slots.forget(digest)
        return self.cache.remove(digest)

    def note_use(self, digests: Sequence[Digest]) -> None:
        """Notes that versions were leased now."""
        now_s = self.clock()
        for record in self.registry:
            for digest in digests:
                if digest in record.versions:
                    record.versions[digest].last_use_time_s = now_s

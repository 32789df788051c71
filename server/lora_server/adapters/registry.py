"""What is known by name: names and ids are tags of a source, digests are its versions. A pure data structure.

Ids never rebind: an id belongs to the folder it was first seen with until that adapter is unloaded. The manager holds
its lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_server.adapters.naming import name_for, stable_adapter_id
from lora_server.adapters.source import UPLOAD_SCHEME, Signature
from lora_server.errors import AdapterAlreadyExistsError, AdapterNotFoundError
from lora_server.types import (
    AdapterSource,
    ById,
    ByName,
    ComponentSummary,
    Digest,
    LoadReport,
    PinInfo,
    Tenants,
    may_use,
)


@dataclass(slots=True)
class Version:
    """What is remembered of a version, cached or not; times are Unix times in seconds."""

    digest: Digest
    size_bytes: int
    rank: int
    components: tuple[ComponentSummary, ...]
    load_time_s: float
    last_use_time_s: float | None = None
    failure: str = ""
    modules: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """The server's own copy of a pinned version: its digest, and the *key* under which the store has it."""

    key: Digest
    digest: Digest


@dataclass(slots=True, eq=False)
class Record:
    """One registered adapter.

    Attributes:
        name: Its name.
        source: As its client sent it first.
        folder: What the source means, links resolved.
        signature: Of the files that the current version was read from.
        tenants: Who may use it (`adapters.tenants`); None is everybody.
        versions: By digest, the most recently loaded last.
        current: Digest of the version that new requests get.
        allow_partial: Whether tensors without a module are left out when it is read.
        lost_pin: A pin from before a restart that could not be satisfied yet.
        stored: The server's own copy of what is pinned, if its source lies elsewhere.
        busy_until_s: Monotonic time until which its files are taken for being written, because they did not settle.
    """

    name: str
    source: AdapterSource
    folder: Path
    signature: Signature
    versions: dict[Digest, Version]
    current: Digest
    ids: list[int] = field(default_factory=list)
    default_scale: float = 1.0
    pin: PinInfo | None = None
    allow_partial: bool = False
    lost_pin: PinInfo | None = None
    stored: StoredCopy | None = None
    tenants: Tenants = None
    busy_until_s: float = 0.0

    @property
    def store_keys(self) -> set[Digest]:
        """What it needs of the server's own store."""
        keys = set() if self.stored is None else {self.stored.key}
        if self.source.path.startswith(UPLOAD_SCHEME):
            keys.add(self.source.path.removeprefix(UPLOAD_SCHEME))
        return keys

    def follows(self, source: AdapterSource) -> bool:
        """Whether *source* may take this record's place as its next version.

        An upload may that of an earlier one; and what a path means may have changed: a link was switched, a branch of
        the hub has moved.
        """
        mine, other = self.source.path, source.path
        return mine == other or (mine.startswith(UPLOAD_SCHEME) and other.startswith(UPLOAD_SCHEME))

    @property
    def is_partial(self) -> bool:
        """Whether the current version was read without some of its tensors."""
        report = self.current_version.report
        return report is not None and report.num_unmatched_keys > 0

    @property
    def current_version(self) -> Version:
        """The version that new requests get."""
        return self.versions[self.current]


@dataclass(frozen=True, slots=True)
class Tags:
    """What a source will be called: fixed before its files are read, so that a conflict costs nothing.

    Attributes:
        name: The name.
        id: The id, or None if the record has it.
        record: The record that has the name, if there is one.
    """

    name: str
    id: int | None
    record: Record | None


class Registry:
    """Adapters by name and id."""

    def __init__(self) -> None:
        self._by_name: dict[str, Record] = {}
        self._folder_of_id: dict[int, Path] = {}

    def __iter__(self) -> Iterator[Record]:
        """Yields the records by name."""
        return iter([self._by_name[name] for name in sorted(self._by_name)])

    def get(self, name: str) -> Record | None:
        """Returns the record of a name; None if there is none."""
        return self._by_name.get(name)

    def find(self, ref: ByName | ById) -> Record:
        """Returns the record of a name or id.

        Raises:
            AdapterNotFoundError: If there is none.
        """
        if isinstance(ref, ByName):
            record = self._by_name.get(ref.name)
            if record is None:
                raise AdapterNotFoundError(ref.name)
            return record
        for record in self:
            if ref.id in record.ids:
                return record
        raise AdapterNotFoundError(ref.id)

    def find_version(self, digest: Digest, tenant: str | None = None) -> Record:
        """Returns a record that knows the version and admits *tenant*, one where it is current if there is one.

        Raises:
            AdapterNotFoundError: If there is none.
        """
        found = [record for record in self if digest in record.versions and may_use(record.tenants, tenant)]
        if not found:
            raise AdapterNotFoundError(digest)
        return next((record for record in found if record.current == digest), found[0])

    def live(self, record: Record) -> Record:
        """Returns the record that has *record*'s name and folder now, *record* itself unless it was loaded anew.

        Raises:
            AdapterNotFoundError: If *record* was unloaded or replaced meanwhile.
        """
        found = self._by_name.get(record.name)
        if found is None or found.folder != record.folder:
            raise AdapterNotFoundError(record.name)
        return found

    def uses(self, digest: Digest) -> bool:
        """Whether any record knows the version."""
        return any(digest in record.versions for record in self._by_name.values())

    def tags(self, source: AdapterSource, folder: Path, *, replace: bool) -> Tags:
        """Decides the name and id that *source* gets; changes nothing.

        Without a name, a folder that is registered keeps its name. A second name for one folder is a second adapter.

        Raises:
            AdapterAlreadyExistsError: If another source has the name (without *replace*) or the id.
        """
        record = self._record_for(source, folder)
        if record is not None and record.folder != folder and not replace and not record.follows(source):
            raise AdapterAlreadyExistsError(record.name, record.source.path)
        adapter_id = source.id if source.id is not None else stable_adapter_id(source.path)
        name = record.name if record else source.name or name_for(source.path, adapter_id, self._by_name)
        if source.id is None and adapter_id in self._folder_of_id and not (record and adapter_id in record.ids):
            # The folder's other name has this id, or what the path meant when it was seen first.
            adapter_id = stable_adapter_id(f"{source.path}#{name}")
        owner = self._folder_of_id.get(adapter_id)
        if record is not None and adapter_id in record.ids and (owner == folder or record.follows(source)):
            return Tags(name, None, record)
        if owner is not None:
            raise AdapterAlreadyExistsError(adapter_id, str(owner))
        return Tags(name, adapter_id, record)

    def add(self, record: Record) -> None:
        """Registers a new record under its name, in place of any other."""
        self._by_name[record.name] = record
        for adapter_id in record.ids:
            self._folder_of_id[adapter_id] = record.folder

    def add_id(self, record: Record, adapter_id: int) -> None:
        """Gives a record one more id."""
        record.ids.append(adapter_id)
        self._folder_of_id[adapter_id] = record.folder

    def move(self, record: Record, source: AdapterSource, folder: Path) -> None:
        """Notes that a record's files lie elsewhere from now on; its name and ids stay."""
        record.source, record.folder = AdapterSource(source.path), folder
        for adapter_id in record.ids:
            self._folder_of_id[adapter_id] = folder

    def remove(self, record: Record) -> None:
        """Forgets a record, its name and its ids."""
        del self._by_name[record.name]
        for adapter_id in record.ids:
            self._folder_of_id.pop(adapter_id, None)

    def _record_for(self, source: AdapterSource, folder: Path) -> Record | None:
        if source.name is not None:
            return self._by_name.get(source.name)
        if source.id is not None:
            for record in self:
                if source.id in record.ids:
                    return record
        found = [each for each in self if each.folder == folder or each.source.path == source.path]
        named_after = stable_adapter_id(source.path)
        return next((each for each in found if named_after in each.ids), found[0] if found else None)

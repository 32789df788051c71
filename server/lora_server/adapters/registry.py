"""What is known by name: names and ids are tags of a source, digests are its versions. A pure data structure.

Ids never rebind: an id belongs to the folder it was first seen with until that adapter is unloaded. The manager holds
its lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_server.adapters.naming import name_for, stable_adapter_id
from lora_server.adapters.source import Signature
from lora_server.errors import AdapterAlreadyExistsError, AdapterNotFoundError
from lora_server.types import AdapterSource, ById, ByName, ComponentSummary, Digest, PinInfo, Tenants, may_use


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
    tenants: Tenants = None

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

    def uses(self, digest: Digest) -> bool:
        """Whether any record knows the version."""
        return any(digest in record.versions for record in self)

    def tags(self, source: AdapterSource, folder: Path, *, replace: bool) -> Tags:
        """Decides the name and id that *source* gets; changes nothing.

        Without a name, a folder that is registered keeps its name. A second name for one folder is a second adapter.

        Raises:
            AdapterAlreadyExistsError: If another source has the name (without *replace*) or the id.
        """
        adapter_id = source.id if source.id is not None else stable_adapter_id(source.path)
        record = self._record_for(source, folder)
        if record is not None and record.folder != folder and not replace:
            raise AdapterAlreadyExistsError(record.name, record.source.path)
        owner = self._folder_of_id.get(adapter_id)
        if owner is not None and owner != folder:
            raise AdapterAlreadyExistsError(adapter_id, str(owner))
        name = record.name if record else source.name or name_for(source.path, adapter_id, self._by_name)
        if record is not None and adapter_id in record.ids:
            return Tags(name, None, record)
        if owner is not None:  # the folder's other name has this id
            if source.id is not None:
                raise AdapterAlreadyExistsError(adapter_id, str(owner))
            adapter_id = stable_adapter_id(f"{source.path}#{name}")
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
        return next((record for record in self if record.folder == folder), None)

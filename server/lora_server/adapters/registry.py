"""What is known by name: names and ids are tags of a source, digests are its versions. A pure data structure.

Ids never rebind: an id belongs to the folder it was first seen with until that adapter is unloaded. What operators have
registered comes before what a tenant's own requests have named (`on_demand`), and one tenant never finds what another's
have. The manager holds its lock around every call.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from heapq import merge
from itertools import chain
from pathlib import Path

from lora_server.adapters.naming import name_for, stable_adapter_id
from lora_server.adapters.on_demand import OnDemand
from lora_server.adapters.places import Place, place_by_name
from lora_server.adapters.records import Record, Standing, Tags, Version
from lora_server.adapters.tenants import Bindings
from lora_server.errors import AdapterAlreadyExistsError, AdapterNotFoundError
from lora_server.types import AdapterSource, ById, ByName, Digest, Tenants, Viewer, may_use


class Registry:
    """Adapters by name, id, folder and digest. Nothing but iterating takes longer, the more there are."""

    def __init__(self, max_on_demand: int) -> None:
        """*max_on_demand* names, and ids, of each tenant are kept of what its requests have named by sources."""
        self._max_on_demand = max_on_demand
        self._by_name: dict[str, Record] = {}
        self._names: list[str] = []
        self._by_id: dict[int, Record] = {}
        self._lying_at: defaultdict[Path | str, set[Record]] = defaultdict(set)
        self._knowing: defaultdict[Digest, dict[Record, None]] = defaultdict(dict)
        self._on_demand: dict[str | None, OnDemand] = {}
        self._bindings = Bindings()

    def __iter__(self) -> Iterator[Record]:
        """Yields what is registered, by name."""
        return iter([self._by_name[name] for name in self._names])

    def __len__(self) -> int:
        """How many are registered."""
        return len(self._by_name)

    def known(self) -> Iterator[Record]:
        """Yields every record that has a name: what is registered, then what requests of tenants have named."""
        return chain(self, *self._on_demand.values())

    def get(self, name: str) -> Record | None:
        """Returns what is registered under a name; None if nothing is."""
        return self._by_name.get(name)

    # Who finds what

    @property
    def has_bindings(self) -> bool:
        """Whether anything is bound to tenants."""
        return bool(self._bindings)

    def bound(self) -> list[Record]:
        """Returns what is bound."""
        return [each for each in self._bindings if isinstance(each, Record)]

    def shows(self, record: Record, viewer: Viewer) -> bool:
        """Whether a registered record exists for *viewer*."""
        return viewer.is_operator or (
            may_use(record.tenants, viewer.tenant) and self._bindings.admits(record.place, viewer.tenant)
        )

    def admits(self, place: Place, viewer: Viewer) -> bool:
        """Whether what lies at *place* may be used by *viewer*."""
        return viewer.is_operator or self._bindings.admits(place, viewer.tenant)

    def still_finds(self, record: Record, viewer: Viewer) -> bool:
        """Whether *viewer*, whose request has found *record* before, may still use it."""
        if record.standing is Standing.REGISTERED:
            return self.shows(record, viewer)
        return self.admits(record.place, viewer)

    def find(self, ref: ByName | ById, viewer: Viewer) -> Record:
        """Returns the record that a name or id means for *viewer*.

        Raises:
            AdapterNotFoundError: If there is none.
        """
        asked = ref.name if isinstance(ref, ByName) else ref.id
        record = self._named(ref.name, viewer) if isinstance(ref, ByName) else self._with_id(ref.id, viewer)
        if record is None:
            raise AdapterNotFoundError(asked)
        return record

    def found_by_a_tenant(self, ref: ByName | ById) -> Record | None:
        """Returns what a name or id means for a tenant, one of them, by what its requests have named."""
        there = (
            own.named(ref.name) if isinstance(ref, ByName) else own.with_id(ref.id) for own in self._on_demand.values()
        )
        return next((each for each in there if each is not None and each.standing is Standing.ON_DEMAND), None)

    def find_version(self, digest: Digest, viewer: Viewer) -> Record:
        """Returns a record that knows the version, one where it is current if there is one, registered ones first.

        Raises:
            AdapterNotFoundError: If *viewer* finds none.
        """
        found = [record for record in self._knowing.get(digest, ()) if self._finds(record, viewer)]
        if not found:
            raise AdapterNotFoundError(digest)
        return min(found, key=lambda each: (each.current != digest, *_order(each)))

    def live(self, record: Record) -> Record:
        """Returns the record that has *record*'s name and folder now, *record* itself unless it was loaded anew.

        Raises:
            AdapterNotFoundError: If *record* was unloaded, replaced or forgotten meanwhile.
        """
        if record.standing in (Standing.ON_DEMAND, Standing.DRAFT):
            return record
        found = self._by_name.get(record.name)
        if found is None or found.folder != record.folder or record.standing is Standing.FORGOTTEN:
            raise AdapterNotFoundError(record.name)
        return found

    def uses(self, digest: Digest) -> bool:
        """Whether any record knows the version."""
        return digest in self._knowing

    def page(self, viewer: Viewer, after: str, prefix: str) -> Iterator[Record]:
        """Yields what *viewer* finds whose names come after *after* and begin with *prefix*, by name.

        What is registered or forgotten meanwhile may be there or not.
        """
        own = self._own(viewer)
        mine = [record.name for record in own or () if record.name > after and record.name.startswith(prefix)]
        others = self._names[bisect_left(self._names, max(after, prefix)) :]
        for name in merge(others, sorted(mine)):
            if not name.startswith(prefix):
                return
            record = self._named(name, viewer) if name > after else None
            if record is not None:
                after = name  # once, if it is both registered and the tenant's own
                yield record

    def _finds(self, record: Record, viewer: Viewer) -> bool:
        if record.standing is Standing.REGISTERED:
            return self.shows(record, viewer)
        own = self._own(viewer)
        return own is not None and own.named(record.name) is record and self.admits(record.place, viewer)

    def _own(self, viewer: Viewer) -> OnDemand | None:
        return self._on_demand.get(viewer.tenant) if viewer.has_own else None

    def _named(self, name: str, viewer: Viewer) -> Record | None:
        record = self._by_name.get(name)
        if record is not None and self.shows(record, viewer):
            return record
        own = self._own(viewer)
        mine = own.named(name) if own is not None else None
        return mine if mine is not None and self.admits(mine.place, viewer) else None

    def _with_id(self, adapter_id: int, viewer: Viewer) -> Record | None:
        record = self._by_id.get(adapter_id)
        if record is not None and self.shows(record, viewer):
            return record
        own = self._own(viewer)
        mine = own.with_id(adapter_id) if own is not None else None
        return mine if mine is not None and self.still_finds(mine, viewer) else None

    def at(self, source: AdapterSource, folder: Path, viewer: Viewer) -> Record | None:
        """Returns what *viewer* finds of a folder, or of the same path; what has its id from the path comes first."""
        marks: tuple[Path | str, ...] = (folder, source.path)
        there = [each for mark in marks for each in self._lying_at.get(mark, ()) if self._finds(each, viewer)]
        named_after = stable_adapter_id(source.path)

        def order(record: Record) -> tuple[bool, bool, str]:
            on_demand, name = _order(record)
            return on_demand, named_after not in record.ids, name

        return min(there, key=order, default=None)

    # What a source is called

    def tags(self, source: AdapterSource, folder: Path, viewer: Viewer, *, replace: bool = False) -> Tags:
        """Decides the name and id that *source* gets among what *viewer* finds; changes nothing.

        Without a name, a folder that is known keeps its name. A second name for one folder is a second adapter.

        Raises:
            AdapterAlreadyExistsError: If another source has the name (without *replace*) or the id.
        """
        record = self._record_for(source, folder, viewer)
        follows = record is not None and _may_follow(record, source, viewer)
        if record is not None and record.folder != folder and not replace and not follows:
            raise AdapterAlreadyExistsError(record.name, record.source.path)
        adapter_id = source.id if source.id is not None else stable_adapter_id(source.path)
        name = record.name if record else source.name or name_for(source.path, adapter_id, _Taken(self, viewer))
        owner = self._with_id(adapter_id, viewer)
        if source.id is None and owner not in (None, record):
            # The folder's other name has this id, or what the path meant when it was seen first.
            adapter_id = stable_adapter_id(f"{source.path}#{name}")
            owner = self._with_id(adapter_id, viewer)
        if record is not None and owner is record and (record.folder == folder or follows):
            return Tags(name, None, record)
        if owner is not None:
            raise AdapterAlreadyExistsError(adapter_id, owner.source.path)
        return Tags(name, adapter_id, record)

    def is_registered_at(self, folder: Path) -> bool:
        """Whether anything of a folder is registered."""
        return any(record.standing is Standing.REGISTERED for record in self._lying_at.get(folder, ()))

    def own_at(self, source: AdapterSource, folder: Path, viewer: Viewer) -> Record | None:
        """Returns what *viewer*'s requests have named of a folder, by the name that *source* asks for if it does."""
        there = [record for record in self._own(viewer) or () if record.folder == folder]
        return next((each for each in there if source.name in (None, each.name) and not self.get(each.name)), None)

    def named(self, name: str, viewer: Viewer) -> Record | None:
        """Returns what a name means for *viewer*; None for nothing."""
        return self._named(name, viewer)

    def _record_for(self, source: AdapterSource, folder: Path, viewer: Viewer) -> Record | None:
        if source.name is not None:
            return self._named(source.name, viewer)
        if source.id is not None and (record := self._with_id(source.id, viewer)) is not None:
            return record
        return self.at(source, folder, viewer)

    # Changes

    def add(self, record: Record) -> None:
        """Registers a record under its name, in place of any other."""
        old = self._by_name.get(record.name)
        if old is not None:
            self.remove(old)
        record.standing, record.owner = Standing.REGISTERED, None
        self._by_name[record.name] = record
        insort(self._names, record.name)
        for adapter_id in record.ids:
            self._by_id[adapter_id] = record
        self._index(record)
        self.bind(record, record.tenants)

    def draft(self, record: Record) -> None:
        """Takes up what a request has read and nobody finds; `keep` or `remove` is to follow."""
        self._index(record)

    def keep(self, record: Record) -> list[Record]:
        """Lets a draft be found by its owner; returns what is to be removed for it."""
        own = self._on_demand.setdefault(record.owner, OnDemand(self._max_on_demand))
        record.standing = Standing.ON_DEMAND
        return own.add(record)

    def promote(self, record: Record) -> None:
        """Registers what was found by its owner alone; with those of its ids that nothing registered has."""
        self.remove(record)
        record.ids = [each for each in record.ids if each not in self._by_id] or [
            stable_adapter_id(f"{record.source.path}#{record.name}")
        ]
        self.add(record)

    def add_id(self, record: Record, adapter_id: int, viewer: Viewer) -> None:
        """Gives a record one more id: what is registered gets it for everybody from operators, else for the tenant."""
        if record.standing is Standing.REGISTERED and not viewer.has_own:
            record.ids.append(adapter_id)
            self._by_id[adapter_id] = record
            return
        if record.standing is Standing.ON_DEMAND and adapter_id not in record.ids:
            record.ids.append(adapter_id)
        self._on_demand.setdefault(viewer.tenant, OnDemand(self._max_on_demand)).add_id(record, adapter_id)

    def touch(self, record: Record, viewer: Viewer) -> None:
        """Notes that *viewer* uses a record."""
        own = self._own(viewer)
        if own is not None:
            own.touch(record)

    def move(self, record: Record, source: AdapterSource, folder: Path) -> None:
        """Notes that a record's files lie elsewhere from now on; its name and ids stay."""
        self._unindex_place(record)
        record.source, record.folder = AdapterSource(source.path), folder
        self.settle_at(record, place_by_name(source.path, folder))
        self._index_place(record)

    def settle_at(self, record: Record, place: Place) -> None:
        """Notes what was seen on the disk of where a record's files are."""
        record.place = place
        self.bind(record, record.tenants)

    def bind(self, record: Record, tenants: Tenants) -> None:
        """Binds a record to *tenants*; None opens it."""
        record.tenants = tenants
        if record.standing is Standing.REGISTERED:
            self._bindings.put(record, record.place, tenants)

    def inherited(self, place: Place) -> Tenants:
        """Returns who may use a new name of *place*; None is everybody."""
        return self._bindings.inherited(place)

    def set_version(self, record: Record, version: Version) -> None:
        """Makes *version* the most recently loaded of a record, and the current one."""
        record.versions.pop(version.digest, None)
        record.versions[version.digest] = version
        record.current = version.digest
        self._knowing[version.digest][record] = None

    def drop_version(self, record: Record, digest: Digest) -> None:
        """Forgets a version of a record that is not current."""
        del record.versions[digest]
        self._unknow(record, digest)

    def remove(self, record: Record) -> None:
        """Forgets a record, its name and its ids."""
        if self._by_name.get(record.name) is record:
            del self._by_name[record.name]
            del self._names[bisect_left(self._names, record.name)]
            for adapter_id in record.ids:
                if self._by_id.get(adapter_id) is record:
                    del self._by_id[adapter_id]
        own = self._on_demand.get(record.owner)
        if own is not None and record.standing is Standing.ON_DEMAND:
            own.remove(record)
        self._bindings.put(record, record.place, None)
        self._unindex_place(record)
        for digest in record.versions:
            self._unknow(record, digest)
        record.standing = Standing.GONE

    def check_integrity(self) -> None:
        """Recomputes the indexes; AssertionError if they are wrong."""
        assert self._names == sorted(self._by_name)
        for record in self:
            assert record.standing is Standing.REGISTERED
            assert all(self._by_id[each] is record for each in record.ids)
            assert (record in self._bindings) == (record.tenants is not None)
        for tenant, own in self._on_demand.items():
            own.check_integrity()
            assert all(record.owner == tenant for record in own)
        for record in self.known():
            assert record.current in record.versions
            assert record in self._lying_at[record.folder]
            assert all(record in self._knowing[digest] for digest in record.versions)
        gone = (Standing.GONE, Standing.FORGOTTEN)
        indexed = [*self._by_id.values(), *chain(*self._lying_at.values()), *chain(*self._knowing.values())]
        assert not any(record.standing in gone for record in indexed)
        assert len(self._by_id) == sum(len(record.ids) for record in self)

    def _index(self, record: Record) -> None:
        self._index_place(record)
        for digest in record.versions:
            self._knowing[digest][record] = None

    def _index_place(self, record: Record) -> None:
        for mark in (record.folder, record.source.path):
            self._lying_at[mark].add(record)

    def _unindex_place(self, record: Record) -> None:
        for mark in (record.folder, record.source.path):
            if mark in self._lying_at:
                self._lying_at[mark].discard(record)
                if not self._lying_at[mark]:
                    del self._lying_at[mark]

    def _unknow(self, record: Record, digest: Digest) -> None:
        if digest in self._knowing:
            self._knowing[digest].pop(record, None)
            if not self._knowing[digest]:
                del self._knowing[digest]


class _Taken:
    """The names that are taken for a viewer, as a container."""

    def __init__(self, registry: Registry, viewer: Viewer) -> None:
        self._registry, self._viewer = registry, viewer

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._registry.named(name, self._viewer) is not None


def _order(record: Record) -> tuple[bool, str]:
    """What is registered comes first, then the name decides."""
    return record.standing is not Standing.REGISTERED, record.name


def _may_follow(record: Record, source: AdapterSource, viewer: Viewer) -> bool:
    """Whether *source* may take a record's place: an operator's upload that of another, a path its own."""
    if viewer.has_own and record.standing is Standing.REGISTERED:
        return record.source.path == source.path and record.follows(source)
    return record.follows(source)

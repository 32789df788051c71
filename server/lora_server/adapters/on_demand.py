"""What the requests of one tenant have named by sources: names and ids that nobody else finds. A pure data structure.

Bounded, the least recently used first to go; nothing of it survives a restart. The manager holds its lock around every
call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lora_server.adapters.records import Record, Standing


class OnDemand:
    """Adapters by name, and ids of these and of registered ones.

    | invariant | |
    |---|---|
    | names, ids | at most *most* of each |
    | an id's record | is known here by its name, or registered |
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._ids: OrderedDict[int, Record] = OrderedDict()

    def __iter__(self) -> Iterator[Record]:
        """Yields the records, the least recently used first."""
        return iter(self._records.values())

    def named(self, name: str) -> Record | None:
        """Returns the record of a name; None if there is none."""
        return self._records.get(name)

    def with_id(self, adapter_id: int) -> Record | None:
        """Returns the record of an id; None if there is none, or if it was forgotten meanwhile."""
        record = self._ids.get(adapter_id)
        return None if record is None or record.standing is Standing.GONE else record

    def add(self, record: Record) -> list[Record]:
        """Adds a record, with its ids, in place of what had its name; returns what is to be forgotten for it."""
        old = self._records.pop(record.name, None)
        self._records[record.name] = record
        for adapter_id in record.ids:
            self.add_id(record, adapter_id)
        surplus = list(self)[: max(0, len(self._records) - self._most)]
        return surplus if old is None else [old, *surplus]

    def add_id(self, record: Record, adapter_id: int) -> None:
        """Gives a record, one of these or a registered one, an id for this tenant."""
        self._ids[adapter_id] = record
        self._ids.move_to_end(adapter_id)
        while len(self._ids) > self._most:
            forgotten, owner = self._ids.popitem(last=False)
            if owner.standing is Standing.ON_DEMAND and len(owner.ids) > 1 and forgotten in owner.ids:
                owner.ids.remove(forgotten)

    def touch(self, record: Record) -> None:
        """Makes a record the most recently used, and its ids; ignores what is not of these."""
        if self._records.get(record.name) is record:
            self._records.move_to_end(record.name)
        for adapter_id in record.ids:
            if self._ids.get(adapter_id) is record:
                self._ids.move_to_end(adapter_id)

    def check_integrity(self) -> None:
        """Checks the invariants; AssertionError if they do not hold."""
        assert len(self._records) <= self._most
        assert len(self._ids) <= self._most
        assert all(record.name == name for name, record in self._records.items())
        assert all(record.standing is Standing.ON_DEMAND for record in self)
        for record in self._ids.values():
            assert record.standing is not Standing.ON_DEMAND or self._records[record.name] is record

    def remove(self, record: Record) -> None:
        """Forgets a record and its ids."""
        if self._records.get(record.name) is record:
            del self._records[record.name]
        for adapter_id in [each for each, owner in self._ids.items() if owner is record]:
            del self._ids[adapter_id]

"""The host tier: which versions stay in memory. A pure data structure.

Owns least-recently-used order, pins, leases and the books of bytes. Knows nothing of tensors, files or threads: the
manager holds its lock around every call, and no operation blocks.

| invariant | |
|---|---|
| `used_bytes` | sum of the sizes of all entries, never more than the budget |
| `pinned_bytes`, `num_pinned`, `num_leases` | what they say, kept in step, so that asking costs nothing |
| `len(self)` | never more than the count limit |
| pinned entries | never more than their share of the budget and of the count, so that something is always evictable |
| a pinned or leased entry | is never evicted |
| `_entries` | in order of use, the least recently used first |

Terms: a *pin* is an owner's lasting wish; a *lease* is a request's short use, counted; *evict* is automatic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lora_server.errors import CacheExhaustedError, PinsExhaustedError
from lora_server.types import Digest

ValueT = TypeVar("ValueT")


@dataclass(slots=True)
class _Entry(Generic[ValueT]):
    value: ValueT
    size_bytes: int
    leases: int = 0
    owners: set[str] = field(default_factory=set)
    doomed: bool = False

    @property
    def evictable(self) -> bool:
        return not self.leases and not self.owners


class AdapterCache(Generic[ValueT]):
    """Versions by digest, within a byte budget and a count limit."""

    def __init__(self, budget_bytes: int, max_adapters: int, max_pinned_share: float = 1.0) -> None:
        """*max_pinned_share*, 0 to 1, of the bytes and of the count may be pinned; below 1, never the last place."""
        self._budget_bytes = budget_bytes
        self._max_adapters = max_adapters
        self.max_pinned_bytes = int(budget_bytes * max_pinned_share)
        self._max_pinned = min(int(max_adapters * max_pinned_share), max_adapters - (max_pinned_share < 1))
        self._entries: OrderedDict[Digest, _Entry[ValueT]] = OrderedDict()
        self._used_bytes = 0
        self._evictions = 0
        self.pinned_bytes = 0  # of pinned entries
        self.num_pinned = 0
        self.num_leases = 0  # that are out, of all versions

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: object) -> bool:
        """Whether the version is cached. Does not count as a use."""
        return digest in self._entries

    def __iter__(self) -> Iterator[Digest]:
        """Yields the digests, the least recently used first."""
        return iter(self._entries)

    @property
    def used_bytes(self) -> int:
        """Bytes of all entries."""
        return self._used_bytes

    @property
    def evictions(self) -> int:
        """How many entries were evicted since the start."""
        return self._evictions

    def get(self, digest: Digest) -> ValueT | None:
        """Returns the version's value and makes it the most recently used; None if it is not cached."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry.value

    def put(self, values: Mapping[Digest, tuple[ValueT, int]]) -> bool:
        """Adds all of *values*, (value, size in bytes) by digest, evicting as need be; all of them or none.

        Versions that are cached already are only made recent; none of *values* is evicted for another. Returns False,
        with nothing changed, if only leases are in the way: try again when one is released.

        Raises:
            CacheExhaustedError: If they can never fit beside the pins. Nothing is changed.
        """
        new = {digest: item for digest, item in values.items() if digest not in self._entries}
        needed_bytes = sum(size_bytes for _, size_bytes in new.values())
        self.check_fits(needed_bytes, len(new), kept=values.keys())
        victims = self._victims(needed_bytes, len(new), kept=values.keys())
        if victims is None:
            return False
        for digest in victims:
            self._drop(digest)
            self._evictions += 1
        for digest, (value, size_bytes) in new.items():
            self._entries[digest] = _Entry(value, size_bytes)
            self._used_bytes += size_bytes
        for digest in values:
            self._entries.move_to_end(digest)
            self._entries[digest].doomed = False
        return True

    def check_fits(self, needed_bytes: int, needed_count: int, kept: Iterable[Digest] = ()) -> None:
        """Checks that so much more could fit if every lease were released, beside the pins and *kept*; changes nothing.

        Raises:
            CacheExhaustedError: If it never could.
        """
        kept_entries = [entry for digest in set(kept) if (entry := self._entries.get(digest)) is not None]
        fixed = [entry for entry in kept_entries if not entry.owners]
        evictable_bytes = self._budget_bytes - self.pinned_bytes - sum(entry.size_bytes for entry in fixed)
        evictable_count = self._max_adapters - self.num_pinned - len(fixed)
        if needed_bytes > evictable_bytes:
            raise CacheExhaustedError("bytes", needed_bytes, max(0, evictable_bytes))
        if needed_count > evictable_count:
            raise CacheExhaustedError("adapters", needed_count, max(0, evictable_count))

    def lease(self, digest: Digest) -> ValueT:
        """Takes a lease on a cached version and makes it the most recently used; KeyError if it is not cached."""
        entry = self._entries[digest]
        entry.leases += 1
        self.num_leases += 1
        self._entries.move_to_end(digest)
        return entry.value

    def release(self, digest: Digest) -> bool:
        """Gives back one lease; a doomed version goes with its last. Returns whether it went."""
        entry = self._entries[digest]
        assert entry.leases > 0
        entry.leases -= 1
        self.num_leases -= 1
        gone = entry.doomed and entry.evictable
        if gone:
            self._drop(digest)
        return gone

    def is_leased(self, digest: Digest) -> bool:
        """Whether a request uses the version now."""
        entry = self._entries.get(digest)
        return entry is not None and entry.leases > 0

    def is_doomed(self, digest: Digest) -> bool:
        """Whether the version goes with its last lease."""
        entry = self._entries.get(digest)
        return entry is not None and entry.doomed

    def owners(self, digest: Digest) -> frozenset[str]:
        """Who has pinned the version; empty also if it is not cached."""
        entry = self._entries.get(digest)
        return frozenset(entry.owners) if entry is not None else frozenset()

    def check_pin(
        self, digest: Digest, owner: str, *, size_bytes: int | None = None, replacing: Digest | None = None
    ) -> None:
        """Checks that `pin` would succeed once *owner* has unpinned *replacing*; changes nothing.

        *size_bytes* is for a version that is not cached yet.

        Raises:
            PinsExhaustedError: If pins would exceed their share. It names what is pinned.
        """
        others = {
            key: entry
            for key, entry in self._entries.items()
            if entry.owners and key != digest and not (key == replacing and entry.owners == {owner})
        }
        names = sorted({name for entry in others.values() for name in entry.owners})
        if size_bytes is None:
            size_bytes = self._entries[digest].size_bytes
        left_bytes = self.max_pinned_bytes - sum(entry.size_bytes for entry in others.values())
        if size_bytes > left_bytes:
            raise PinsExhaustedError("bytes", size_bytes, max(0, left_bytes), names)
        if len(others) >= self._max_pinned:
            raise PinsExhaustedError("adapters", 1, 0, names)

    def pin(self, digest: Digest, owner: str) -> None:
        """Keeps a cached version for *owner*; idempotent; KeyError if it is not cached.

        Raises:
            PinsExhaustedError: If pins would exceed their share; nothing is changed.
        """
        entry = self._entries[digest]
        if not entry.owners:
            self.check_pin(digest, owner)
            self.num_pinned += 1
            self.pinned_bytes += entry.size_bytes
        entry.owners.add(owner)

    def unpin(self, digest: Digest, owner: str) -> None:
        """Ends *owner*'s pin; idempotent, also for a version that is not cached."""
        entry = self._entries.get(digest)
        if entry is not None and owner in entry.owners:
            entry.owners.remove(owner)
            if not entry.owners:
                self.num_pinned -= 1
                self.pinned_bytes -= entry.size_bytes

    def remove(self, digest: Digest) -> int:
        """Forgets an unpinned version: at once, or, if it is leased, with its last lease. Returns bytes freed now."""
        entry = self._entries.get(digest)
        if entry is None or entry.owners:
            return 0
        if entry.leases:
            entry.doomed = True
            return 0
        self._drop(digest)
        return entry.size_bytes

    def check_integrity(self) -> None:
        """Recomputes the books; AssertionError if they are wrong."""
        assert self._used_bytes == sum(entry.size_bytes for entry in self._entries.values())
        assert self._used_bytes <= self._budget_bytes
        assert len(self._entries) <= self._max_adapters
        pinned = [entry for entry in self._entries.values() if entry.owners]
        assert self.pinned_bytes == sum(entry.size_bytes for entry in pinned)
        assert self.num_pinned == len(pinned)
        assert self.num_leases == sum(entry.leases for entry in self._entries.values())
        assert self.pinned_bytes <= self.max_pinned_bytes
        assert self.num_pinned <= self._max_pinned
        assert all(entry.leases >= 0 for entry in self._entries.values())
        assert not any(entry.doomed and entry.evictable for entry in self._entries.values())

    def _victims(self, needed_bytes: int, needed_count: int, kept: Iterable[Digest]) -> list[Digest] | None:
        """The least recently used entries whose end makes room, or None if what may go is not enough."""
        kept_digests = set(kept)
        free_bytes = self._budget_bytes - self._used_bytes
        free_count = self._max_adapters - len(self._entries)
        victims = []
        for digest, entry in self._entries.items():
            if free_bytes >= needed_bytes and free_count >= needed_count:
                break
            if entry.evictable and digest not in kept_digests:
                victims.append(digest)
                free_bytes += entry.size_bytes
                free_count += 1
        return victims if free_bytes >= needed_bytes and free_count >= needed_count else None

    def _drop(self, digest: Digest) -> None:
        self._used_bytes -= self._entries.pop(digest).size_bytes

"""The device tier: which version lies in which slot. A pure data structure with a lock of its own.

The engine thread acquires and releases; the control plane pins and forgets. Knows nothing of tensors: who gets a slot
that needs an upload moves the bytes. A version may be pinned before it has a slot; capacity is kept for it.

| invariant | |
|---|---|
| a slot | has at most one version, a version at most one slot |
| a version that is taken or pinned | is never evicted |
| a version forgotten while it is taken | gives its slot back with the last `release`, unless it was wanted anew |
| pinned versions | at most slots less `min_free`, so that a request can always be served |
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from lora_server.errors import CacheExhaustedError, PinsExhaustedError
from lora_server.types import Digest


class SlotTable:
    """A fixed number of device slots, least recently used first to go. Thread-safe; no operation blocks."""

    def __init__(self, num_slots: int, min_free: int = 1) -> None:
        """Keeps *min_free* slots free of pins."""
        self._num_slots = num_slots
        self._max_pinned = max(0, num_slots - min_free)
        self._lock = threading.Lock()
        self._slots: OrderedDict[Digest, int] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))
        self._taken: dict[Digest, int] = {}
        self._owners: dict[Digest, set[str]] = {}
        self.hits = self.misses = self.evictions = 0  # of versions, by `acquire`, since the start
        self._doomed: set[Digest] = set()

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return self._num_slots

    @property
    def num_resident(self) -> int:
        """How many slots are in use."""
        with self._lock:
            return len(self._slots)

    @property
    def num_pinned(self) -> int:
        """How many versions are pinned, resident or not."""
        with self._lock:
            return len(self._owners)

    def is_resident(self, digest: Digest) -> bool:
        """Whether the version has a slot."""
        with self._lock:
            return digest in self._slots

    def can_acquire(self, digests: Sequence[Digest]) -> bool:
        """Whether `acquire` would succeed now."""
        with self._lock:
            new = [digest for digest in dict.fromkeys(digests) if digest not in self._slots]
            return len(new) <= len(self._free) + len(self._victims(digests))

    def acquire(self, digests: Sequence[Digest]) -> list[tuple[int, Digest, bool]]:
        """Takes a slot for each version, all or none; returns (slot, digest, whether it must be uploaded).

        Raises:
            CacheExhaustedError: If there are not enough slots beside those taken and pinned; nothing is changed.
        """
        with self._lock:
            wanted = list(dict.fromkeys(digests))
            new = [digest for digest in wanted if digest not in self._slots]
            victims = self._victims(wanted)
            missing = len(new) - len(self._free)
            if missing > len(victims):
                raise CacheExhaustedError("slots", len(new), len(self._free) + len(victims))
            for digest in victims[: max(0, missing)]:
                self._free.append(self._slots.pop(digest))
                self.evictions += 1
            self.misses += len(new)
            self.hits += len(wanted) - len(new)
            for digest in new:
                self._slots[digest] = self._free.pop()
            for digest in wanted:
                self._taken[digest] = self._taken.get(digest, 0) + 1
                self._doomed.discard(digest)
                self._slots.move_to_end(digest)
            return [(self._slots[digest], digest, digest in new) for digest in wanted]

    def release(self, digests: Sequence[Digest]) -> None:
        """Gives back what `acquire` took; the versions stay until their slots are needed, or go if forgotten."""
        with self._lock:
            for digest in dict.fromkeys(digests):
                self._taken[digest] -= 1
                if not self._taken[digest]:
                    del self._taken[digest]
                    if digest in self._doomed:
                        self._drop(digest)

    def pin(self, digest: Digest, owner: str) -> None:
        """Keeps room for the version on the device; idempotent for an owner.

        Raises:
            PinsExhaustedError: If too few slots would stay free of pins; nothing is changed. It names what is pinned.
        """
        with self._lock:
            if digest not in self._owners and len(self._owners) >= self._max_pinned:
                pinned = {name for owners in self._owners.values() for name in owners}
                raise PinsExhaustedError("slots", 1, 0, sorted(pinned))
            self._add_owner(digest, owner)

    def unpin(self, digest: Digest, owner: str) -> None:
        """Ends *owner*'s pin; idempotent."""
        with self._lock:
            self._remove_owner(digest, owner)

    def check_move(self, before: Digest, after: Digest, owner: str) -> None:
        """Checks that `move_pin` would succeed; changes nothing.

        Raises:
            CacheExhaustedError: If it would not: others pin *before* too, and there is no room for *after* beside it.
        """
        with self._lock:
            self._check_move(before, after, owner)

    def move_pin(self, before: Digest, after: Digest, owner: str) -> None:
        """Lets *owner*'s pin go over from one version to another, all or nothing.

        Raises:
            CacheExhaustedError: As `check_move`; nothing is changed.
        """
        with self._lock:
            self._check_move(before, after, owner)
            self._remove_owner(before, owner)
            self._add_owner(after, owner)

    def owners(self, digest: Digest) -> frozenset[str]:
        """Who has pinned the version to the device."""
        with self._lock:
            return frozenset(self._owners.get(digest, ()))

    def resident(self) -> frozenset[Digest]:
        """The versions that have a slot."""
        with self._lock:
            return frozenset(self._slots)

    def is_doomed(self, digest: Digest) -> bool:
        """Whether the version gives its slot back with its last `release`."""
        with self._lock:
            return digest in self._doomed

    def pinned(self) -> frozenset[Digest]:
        """The versions that are pinned, resident or not."""
        with self._lock:
            return frozenset(self._owners)

    def holds(self, slot: int, digest: Digest) -> bool:
        """Whether the version lies in this very slot."""
        with self._lock:
            return self._slots.get(digest) == slot

    def forget(self, digest: Digest) -> bool:
        """Frees the version's slot: at once, or, if it is taken, with its last `release`; never while it is pinned.

        Returns whether it is free of one now.
        """
        with self._lock:
            if digest in self._owners:
                return False
            if digest in self._taken:
                self._doomed.add(digest)
                return False
            if digest in self._slots:
                self._drop(digest)
            return True

    def _drop(self, digest: Digest) -> None:
        self._free.append(self._slots.pop(digest))
        self._doomed.discard(digest)

    def _check_move(self, before: Digest, after: Digest, owner: str) -> None:
        others = {d for d, owners in self._owners.items() if d != before or owners - {owner}}
        if after not in others and len(others) >= self._max_pinned:
            raise CacheExhaustedError("slots", 1, 0)

    def _add_owner(self, digest: Digest, owner: str) -> None:
        self._owners.setdefault(digest, set()).add(owner)
        self._doomed.discard(digest)

    def _remove_owner(self, digest: Digest, owner: str) -> None:
        owners = self._owners.get(digest, set())
        owners.discard(owner)
        if not owners:
            self._owners.pop(digest, None)

    def _victims(self, wanted: Sequence[Digest]) -> list[Digest]:
        """Versions that may be evicted, least recently used first."""
        return [d for d in self._slots if d not in self._taken and d not in self._owners and d not in wanted]

    def check_integrity(self) -> None:
        """Recomputes the books; AssertionError if they are wrong."""
        with self._lock:
            used = list(self._slots.values())
            assert sorted(used + self._free) == list(range(self._num_slots))
            assert all(count > 0 for count in self._taken.values())
            assert set(self._taken) <= set(self._slots)
            assert all(self._owners.values())
            assert self._doomed <= set(self._taken)
            assert not self._doomed & set(self._owners)
            assert len(self._owners) <= self._max_pinned

"""The host cache against a simple model: budget, pins, leases, order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lora_server.adapters.cache import AdapterCache
from lora_server.errors import CacheExhaustedError, PinsExhaustedError

DIGESTS = st.sampled_from([f"sha256:{k}" for k in range(8)])


class CacheMachine(RuleBasedStateMachine):
    """Random operations; a plain dictionary of what must still be there stands beside the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: AdapterCache[str] = AdapterCache(100, 5, 0.7)
        self.leases: dict[str, int] = {}
        self.pins: set[str] = set()

    @rule(digest=DIGESTS, size=st.integers(1, 60))
    def put(self, digest: str, size: int) -> None:
        before = list(self.cache)
        try:
            done = self.cache.put({digest: (digest, size)})
        except CacheExhaustedError:
            done = False
        if done:
            assert digest in self.cache
        else:
            assert list(self.cache) == before

    @rule(digest=DIGESTS)
    def lease(self, digest: str) -> None:
        if digest in self.cache:
            assert self.cache.lease(digest) == digest
            self.leases[digest] = self.leases.get(digest, 0) + 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.leases)))
        self.cache.release(digest)
        self.leases[digest] -= 1
        if not self.leases[digest]:
            del self.leases[digest]

    @rule(digest=DIGESTS)
    def pin(self, digest: str) -> None:
        if digest in self.cache:
            try:
                self.cache.pin(digest, "owner")
            except PinsExhaustedError:
                return
            self.pins.add(digest)

    @rule(digest=DIGESTS)
    def unpin(self, digest: str) -> None:
        self.cache.unpin(digest, "owner")
        self.pins.discard(digest)

    @rule(digest=DIGESTS)
    def remove(self, digest: str) -> None:
        freed = self.cache.remove(digest)
        assert not (freed and (digest in self.leases or digest in self.pins))

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check_integrity()
        assert all(digest in self.cache for digest in self.leases)
        assert all(digest in self.cache for digest in self.pins)
        assert self.cache.pinned_bytes <= 70
        assert len(self.pins) <= 3


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_goes_first() -> None:
    """A use moves a version to the end of the queue of those to go."""
    cache: AdapterCache[int] = AdapterCache(3, 3)
    for key in "abc":
        cache.put({key: (1, 1)})
    cache.get("a")
    cache.put({"d": (1, 1)})
    assert list(cache) == ["c", "a", "d"]


def test_what_only_leases_block_waits_and_what_pins_block_fails() -> None:
    """False means try again; an error means never; neither changes anything."""
    cache: AdapterCache[int] = AdapterCache(10, 3)
    cache.put({"a": (1, 8)})
    cache.lease("a")
    assert cache.put({"b": (1, 8)}) is False
    cache.pin("a", "x")
    with pytest.raises(CacheExhaustedError):
        cache.put({"b": (1, 8)})
    assert list(cache) == ["a"]


def test_several_go_in_together_or_not_at_all() -> None:
    """A request's versions never evict one another."""
    cache: AdapterCache[int] = AdapterCache(10, 3)
    cache.put({"a": (1, 6)})
    with pytest.raises(CacheExhaustedError):
        cache.put({"a": (1, 6), "b": (1, 6)})
    assert cache.put({"b": (1, 5), "c": (1, 5)})
    assert list(cache) == ["b", "c"]

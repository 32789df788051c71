"""Races of the manager, each made certain: reads that end late, waits that are given up, pins that end unseen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterAlreadyExistsError,
    AdapterNotFoundError,
    CacheExhaustedError,
    ServerDrainingError,
)
from lora_server.types import AdapterSource, AdapterUse, ByName, PinLevel

from tests.unit.adapters.memory_loader import MemoryLoader


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def loader() -> MemoryLoader:
    """Six adapters of 10 bytes."""
    return MemoryLoader()


@pytest.fixture
def clock() -> Clock:
    """Stands until it is moved."""
    return Clock()


@pytest.fixture
def manager(loader: MemoryLoader, clock: Clock) -> Iterator[AdapterManager]:
    """A manager with room for three versions; its books are checked after every test."""
    made = AdapterManager(CacheConfig(budget_bytes=30, device_slots=4, max_pinned_share=1), loader, clock=clock)
    yield made
    made.check_integrity()
    made.close()


def load(manager: AdapterManager, *paths: str, **options: Any) -> None:
    """Loads paths, one after the other."""
    for path in paths:
        manager.load(AdapterSource(path), **options).result(5)


def resolved(manager: AdapterManager, *names: str) -> Any:
    """Resolves names."""
    return manager.resolve([AdapterUse(ByName(name)) for name in names]).result(5)


def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    """Waits for what another thread will do."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.005)


def test_a_cancelled_wait_for_evicted_versions_leaves_no_lease(manager: AdapterManager) -> None:
    """An acquire that had to read again, and was given up while leases blocked it, takes nothing afterwards."""
    load(manager, "/a")
    wanted = resolved(manager, "a")
    load(manager, "/b", "/c", "/d")  # evicts a
    holder = manager.acquire(resolved(manager, "b", "c", "d")).result(5)
    waiting = manager.acquire(wanted)
    until(lambda: manager.waiting_count == 1)
    assert waiting.cancel()
    holder.release()
    for path in ("/d", "/c", "/b", "/e", "/f", "/d"):  # were a leased still, these could not all take its place
        load(manager, path)
    assert manager.leased_count == 0


def test_a_cancelled_wait_is_forgotten_at_once(manager: AdapterManager) -> None:
    """What nobody waits for any more is not kept in memory until the next lease ends."""
    load(manager, "/a", "/b", "/c")
    with manager.acquire(resolved(manager, "a", "b", "c")).result(5):
        blocked = manager.resolve([AdapterUse(AdapterSource("/d"))])
        until(lambda: manager.waiting_count == 1)
        blocked.cancel()
        until(lambda: manager.waiting_count == 0)


def test_what_is_evicted_while_others_are_read_is_read_again(manager: AdapterManager, loader: MemoryLoader) -> None:
    """A lease of a warm and a cold version does not fail because the warm one went while the cold one came."""
    load(manager, "/a", "/b")
    wanted = resolved(manager, "a", "b")
    load(manager, "/c", "/d", "/e")
    load(manager, "/a", "/c", "/d")  # b is cold, a the next to go
    with loader.held_back("/b"):
        leasing = manager.acquire(wanted)
        until(lambda: manager.reading_count == 1)
        load(manager, "/e")
    with leasing.result(5) as lease:
        assert set(lease.weights) == {"sha256:a", "sha256:b"}


def test_a_name_unloaded_while_its_new_version_is_read_stays_forgotten(
    manager: AdapterManager, loader: MemoryLoader
) -> None:
    """A pin that comes too late does not bring the version back, where nobody could ever unpin it."""
    load(manager, "/a")
    loader.folders["/a"] = ("a2", 10)
    with loader.held_back("/a"):
        pinning = manager.pin(ByName("a"), PinLevel.DEVICE)
        until(lambda: manager.reading_count == 1)
        manager.unload(ByName("a"))
    with pytest.raises(AdapterNotFoundError):
        pinning.result(5)
    assert manager.cache_info().used_bytes == 0


def test_an_unloaded_version_that_a_lease_still_wants_goes_with_that_lease(manager: AdapterManager) -> None:
    """Draining is final: a lease taken later of what is still there does not keep it cached for good."""
    load(manager, "/a")
    wanted = resolved(manager, "a")
    first = manager.acquire(wanted).result(5)
    manager.unload(ByName("a"), drain=True)
    second = manager.acquire(wanted).result(5)
    first.release()
    assert manager.cache_info().used_bytes == 10
    second.release()
    assert manager.cache_info().used_bytes == 0


def test_a_taken_slot_is_freed_when_its_forgotten_version_is_released(manager: AdapterManager) -> None:
    """Unloading with drain frees the slot too, when the request that uses it ends."""
    load(manager, "/a")
    with manager.acquire(resolved(manager, "a")).result(5):
        manager.slots.acquire(["sha256:a"])
        manager.unload(ByName("a"), drain=True)
        assert manager.slots.num_resident == 1
        manager.slots.release(["sha256:a"])
    assert manager.slots.num_resident == 0


def test_a_conflict_of_names_evicts_nobody(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Two new sources that ask for one name: the second is refused, and no warm adapter has gone for it."""
    load(manager, "/a", "/b")
    with loader.held_back("/d"):
        second = manager.load(AdapterSource("/d", name="x"))
        until(lambda: manager.reading_count == 1)
        manager.load(AdapterSource("/c", name="x")).result(5)
    with pytest.raises(AdapterAlreadyExistsError):
        second.result(5)
    assert manager.cache_info().evictions == 0


def test_an_ended_pin_makes_room_for_a_load(manager: AdapterManager, clock: Clock) -> None:
    """Nobody need look at a pin for it to end: what needs its room gets it."""
    load(manager, "/a", "/b", "/c")
    for name in "abc":
        manager.pin(ByName(name), PinLevel.HOST, ttl_s=60).result(5)
    with pytest.raises(CacheExhaustedError):
        load(manager, "/d")
    clock.now_s += 61
    load(manager, "/d")


def test_a_waiter_is_woken_when_a_pin_ends(loader: MemoryLoader) -> None:
    """A load that leases block beside a pin goes on when the pin ends, though no lease does."""
    manager = AdapterManager(CacheConfig(budget_bytes=30, device_slots=4, max_pinned_share=1), loader)
    load(manager, "/a", "/b", "/c")
    with manager.acquire(resolved(manager, "a", "b")).result(5):
        manager.pin(ByName("c"), PinLevel.HOST, ttl_s=0.3).result(5)
        manager.load(AdapterSource("/d")).result(5)
    manager.close()


def test_a_waiter_is_woken_when_a_pin_moves(manager: AdapterManager, loader: MemoryLoader) -> None:
    """The room of a pinned version's predecessor goes to who waits for it; found by the machine in tests/stateful."""
    load(manager, "/a", "/b")
    manager.pin(ByName("a"), PinLevel.HOST).result(5)
    loader.folders["/e"] = ("e", 15)
    with manager.acquire(resolved(manager, "b")).result(5):
        waiting = manager.load(AdapterSource("/e"))
        until(lambda: manager.waiting_count == 1)
        loader.folders["/a"] = ("a2", 5)
        load(manager, "/a")
        waiting.result(5)


def test_a_device_pin_that_cannot_move_stays_where_it_was(loader: MemoryLoader) -> None:
    """Two names of one version share a device pin; a new version that finds no room leaves both pins as they were."""
    loader.folders["/b"] = ("a", 10)
    manager = AdapterManager(CacheConfig(budget_bytes=30, device_slots=2, max_pinned_share=1), loader)
    load(manager, "/a", "/b")
    for name in "ab":
        manager.pin(ByName(name), PinLevel.DEVICE).result(5)
    loader.folders["/b"] = ("b2", 10)
    with pytest.raises(CacheExhaustedError):
        resolved(manager, "b")
    assert manager.get(ByName("b")).current_digest == "sha256:a"
    manager.check_integrity()
    manager.unpin(ByName("a"))
    load(manager, "/c")
    with pytest.raises(CacheExhaustedError):  # b's own pin still holds the only slot that may be pinned
        manager.pin(ByName("c"), PinLevel.DEVICE).result(5)
    manager.close()


def test_a_pin_follows_a_version_that_changes_meanwhile(manager: AdapterManager, loader: MemoryLoader) -> None:
    """A pin whose adapter gets new content while it waits pins the new content."""
    load(manager, "/a", "/b", "/c", "/d")  # a is evicted
    with loader.held_back("/a"):
        pinning = manager.pin(ByName("a"), PinLevel.HOST)
        until(lambda: manager.reading_count == 1)
        loader.folders["/a"] = ("a2", 10)
    assert pinning.result(5).current_digest == "sha256:a2"
    assert manager.get(ByName("a")).pin is not None


def test_closing_fails_everybody_who_waits(loader: MemoryLoader) -> None:
    """Reads that have not begun and waits for leases end with SERVER_DRAINING, none with a bare cancellation."""
    manager = AdapterManager(CacheConfig(budget_bytes=10, device_slots=4, loader_threads=1, max_pinned_share=1), loader)
    load(manager, "/a")
    manager.acquire(resolved(manager, "a")).result(5)
    blocked = manager.load(AdapterSource("/b"))
    until(lambda: manager.waiting_count == 1)
    with loader.held_back("/c"):
        running = manager.load(AdapterSource("/c"))
        until(lambda: manager.reading_count == 1)  # else the only loader may begin with the other
        queued = manager.load(AdapterSource("/d"))
        until(lambda: manager.reading_count == 2)
        closing = threading.Thread(target=manager.close)
        closing.start()
        until(queued.done)
    closing.join(10)
    for future in (blocked, running, queued, manager.load(AdapterSource("/e"))):
        with pytest.raises(ServerDrainingError):
            future.result(5)


def test_what_is_read_and_waits_to_be_cached_is_not_read_again(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Who asks between the end of a read and the moment in which it is cached joins it."""
    load(manager, "/a", "/b", "/c")
    leases = [manager.acquire(resolved(manager, name)).result(5) for name in "abc"]
    first = manager.resolve([AdapterUse(AdapterSource("/d"))])
    until(lambda: manager.waiting_count == 1)
    second = manager.resolve([AdapterUse(AdapterSource("/d"))])
    until(lambda: manager.waiting_count == 2)
    first.cancel()
    for lease in leases:
        lease.release()
    assert second.result(5)[0].applied.digest == "sha256:d"
    assert loader.loads.count("/d") == 1

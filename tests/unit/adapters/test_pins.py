"""The bound on pins: part of the host cache and of the slots always stays evictable."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lora_server.adapters.cache import AdapterCache
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import CacheExhaustedError, PinsExhaustedError
from lora_server.types import AdapterSource, AdapterState, ByName, PinLevel

from tests.unit.adapters.memory_loader import MemoryLoader

Make = Callable[[CacheConfig], AdapterManager]
NOW = [0.0]


@pytest.fixture
def loader() -> MemoryLoader:
    """Six adapters of 10 bytes."""
    return MemoryLoader()


@pytest.fixture
def make(loader: MemoryLoader) -> Iterator[Make]:
    """Makes managers at the time `NOW`; their books are checked after the test."""
    made: list[AdapterManager] = []

    def make(config: CacheConfig) -> AdapterManager:
        made.append(AdapterManager(config, loader, min_free_slots=1, clock=lambda: NOW[0]))
        return made[-1]

    yield make
    for manager in made:
        manager.check_integrity()
        manager.close()


def pin(manager: AdapterManager, name: str, level: PinLevel = PinLevel.HOST, ttl_s: float | None = None) -> None:
    """Loads and pins `/name`."""
    manager.load(AdapterSource(f"/{name}", name=name)).result(5)
    manager.pin(ByName(name), level, ttl_s).result(5)


def test_a_pin_that_leaves_too_little_is_refused_and_names_the_others(make: Make) -> None:
    """The error says what is pinned and what would fit; nothing was changed, and another adapter can be loaded."""
    manager = make(CacheConfig(budget_bytes=40, device_slots=9, max_pinned_share=0.6))
    pin(manager, "a")
    pin(manager, "b")
    with pytest.raises(PinsExhaustedError) as refused:
        pin(manager, "c")
    assert refused.value.metadata == {"needed_bytes": "10", "evictable_bytes": "4", "pinned": "a,b"}
    assert "a, b" in refused.value.message
    assert manager.get(ByName("c")).pin is None
    assert manager.cache_info().pinned_bytes == 20
    assert manager.cache_info().max_pinned_bytes == 24
    manager.load(AdapterSource("/d")).result(5)
    pin(manager, "a", PinLevel.DEVICE)  # replacing a pin needs no more room


def test_a_refused_pin_evicts_nothing(make: Make, loader: MemoryLoader) -> None:
    """That pins may not take it is found out before it is read again in another's place."""
    manager = make(CacheConfig(budget_bytes=20, device_slots=9, max_pinned_share=0.5))
    pin(manager, "a")
    for name in "bc":  # c takes the place of b
        manager.load(AdapterSource(f"/{name}", name=name)).result(5)
    loads = len(loader.loads)
    with pytest.raises(PinsExhaustedError):
        manager.pin(ByName("b"), PinLevel.HOST).result(5)
    assert manager.get(ByName("c")).versions[0].state is AdapterState.CACHED
    assert len(loader.loads) == loads


def test_the_count_has_its_share_too_and_the_last_place_is_never_pinned(make: Make) -> None:
    """Small adapters could else fill the count limit with pins."""
    manager = make(CacheConfig(budget_bytes=1000, max_adapters=2, device_slots=9, max_pinned_share=0.9))
    pin(manager, "a")
    with pytest.raises(PinsExhaustedError):
        pin(manager, "b")


def test_a_device_pin_that_fails_in_either_tier_changes_neither(make: Make) -> None:
    """One slot stays free of pins; whichever tier refuses, the other forgets the pin as well."""
    manager = make(CacheConfig(budget_bytes=100, device_slots=2, max_pinned_share=0.9))
    pin(manager, "a", PinLevel.DEVICE)
    with pytest.raises(PinsExhaustedError) as refused:
        pin(manager, "b", PinLevel.DEVICE)
    assert refused.value.metadata["pinned"] == "a"
    assert manager.cache_info().pinned_bytes == 10
    manager = make(CacheConfig(budget_bytes=30, device_slots=2, max_pinned_share=0.5))
    pin(manager, "a")
    with pytest.raises(PinsExhaustedError):
        pin(manager, "b", PinLevel.DEVICE)
    manager.slots.pin("sha256:other", "other")  # no slot is kept for the refused one
    manager.slots.unpin("sha256:other", "other")


def test_a_pin_follows_to_a_new_version_that_only_fits_in_the_old_ones_place(loader: MemoryLoader, make: Make) -> None:
    """The old version's share counts for the new one; one that is too large is refused, and the old stays pinned."""
    manager = make(CacheConfig(budget_bytes=40, device_slots=9, max_pinned_share=0.5))
    pin(manager, "a", PinLevel.DEVICE)
    loader.folders["/a"] = ("a2", 20)
    assert manager.load(AdapterSource("/a", name="a")).result(5).adapter.current_digest == "sha256:a2"
    assert manager.cache_info().pinned_bytes == 20
    loader.folders["/a"] = ("a3", 21)
    manager.load(AdapterSource("/b")).result(5)
    with pytest.raises(CacheExhaustedError):
        manager.load(AdapterSource("/a", name="a")).result(5)
    assert manager.get(ByName("a")).current_digest == "sha256:a2"
    assert manager.cache_info().pinned_bytes == 20


def test_a_pin_that_has_ended_is_in_nobodys_way(make: Make) -> None:
    """A load or another pin that needs the room gets it, though nobody has looked at the pin since."""
    manager = make(CacheConfig(budget_bytes=20, device_slots=9, max_pinned_share=1))
    pin(manager, "a", ttl_s=5)
    pin(manager, "b", ttl_s=5)
    with pytest.raises(CacheExhaustedError):
        manager.load(AdapterSource("/c")).result(5)
    NOW[0] += 6
    pin(manager, "c")
    assert manager.cache_info().pinned_bytes == 10


def test_two_owners_of_one_version_count_once() -> None:
    """Pins are of bytes, not of names."""
    cache: AdapterCache[int] = AdapterCache(10, 10, 0.5)
    cache.put({"x": (1, 5)})
    cache.pin("x", "a")
    cache.pin("x", "b")
    cache.unpin("x", "a")
    cache.check_integrity()
    assert cache.pinned_bytes == 5

"""The manager: registration, loading, leases, pins and versions, with a loader in memory in the place of the disk."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.naming import stable_adapter_id
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterAlreadyExistsError,
    AdapterDigestMismatchError,
    AdapterInUseError,
    AdapterMalformedError,
    AdapterNotFoundError,
    AdapterPinnedError,
    CacheExhaustedError,
    InvalidRequestError,
    LoraServerError,
)
from lora_server.types import (
    AdapterSource,
    AdapterState,
    AdapterUse,
    ByDigest,
    ById,
    ByName,
    PinLevel,
)

from tests.unit.adapters.memory_loader import MemoryLoader


@pytest.fixture
def loader() -> MemoryLoader:
    """Six adapters of 10 bytes."""
    return MemoryLoader()


@pytest.fixture
def manager(loader: MemoryLoader) -> Iterator[AdapterManager]:
    """A manager with room for three; its books are checked after every test."""
    made = AdapterManager(CacheConfig(budget_bytes=30, max_adapters=10, device_slots=4, max_pinned_share=1), loader)
    yield made
    made.check_integrity()
    made.close()


def load(manager: AdapterManager, path: str, **options: Any) -> str:
    """Loads a path; returns its name."""
    name = options.pop("name", None)
    return manager.load(AdapterSource(path, options.pop("id", None), name), **options).result(5).adapter.name


def resolve(manager: AdapterManager, *uses: AdapterUse) -> Any:
    """Resolves uses."""
    return manager.resolve(uses).result(5)


def by(name: str) -> AdapterUse:
    """A use by name."""
    return AdapterUse(ByName(name))


def cached(manager: AdapterManager) -> set[str]:
    """The names that are cached."""
    states = {info.name: info.versions[0].state for info in manager.list()}
    return {name for name, state in states.items() if state in (AdapterState.CACHED, AdapterState.RESIDENT)}


def test_load_registers_under_name_and_stable_id(manager: AdapterManager) -> None:
    """A path gets a name from its last part and the stable id of its text; loading again reads nothing."""
    assert load(manager, "/a") == "a"
    assert manager.get(ById(stable_adapter_id("/a"))).name == "a"
    assert manager.load(AdapterSource("/a")).result(5).load_time_s == 0


def test_concurrent_loads_of_one_adapter_are_one_read(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Ten requests for a cold adapter read it once."""
    with loader.held_back("/a"):
        futures = [manager.resolve([AdapterUse(AdapterSource("/a"))]) for _ in range(10)]
        time.sleep(0.05)
    assert {future.result(5)[0].applied.digest for future in futures} == {"sha256:a"}
    assert loader.loads == ["/a"]


def test_a_bad_file_costs_nobody_a_warm_adapter(manager: AdapterManager, loader: MemoryLoader) -> None:
    """A failed load registers nothing and evicts nothing."""
    for path in ("/a", "/b", "/c"):
        load(manager, path)
    loader.folders["/x"] = ("bad", 30)
    with pytest.raises(AdapterMalformedError):
        load(manager, "/x")
    assert cached(manager) == {"a", "b", "c"}
    with pytest.raises(AdapterNotFoundError):
        manager.get(ByName("x"))


def test_least_recently_used_is_evicted_and_comes_back(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Eviction is silent: the name stays, and the next use reads the files again."""
    for path in ("/a", "/b", "/c", "/d"):
        load(manager, path)
    assert cached(manager) == {"b", "c", "d"}
    assert resolve(manager, by("a"))[0].state_on_arrival is AdapterState.REGISTERED
    assert cached(manager) == {"a", "c", "d"}


def test_pins_survive_and_what_cannot_fit_beside_them_is_refused(manager: AdapterManager) -> None:
    """A pinned adapter is never evicted; too much is CACHE_EXHAUSTED and changes nothing."""
    for name in "abc":
        load(manager, f"/{name}")
        manager.pin(ByName(name), PinLevel.HOST).result(5)
    with pytest.raises(CacheExhaustedError):
        load(manager, "/d")
    with pytest.raises(AdapterPinnedError):
        manager.unload(ByName("a"))
    manager.unpin(ByName("b"))
    load(manager, "/d")
    assert cached(manager) == {"a", "c", "d"}


def test_a_pin_with_an_end_ends(loader: MemoryLoader) -> None:
    """After its ttl the adapter is as if unpinned."""
    now = [1000.0]
    manager = AdapterManager(
        CacheConfig(budget_bytes=30, device_slots=4, max_pinned_share=1), loader, clock=lambda: now[0]
    )
    load(manager, "/a")
    assert manager.pin(ByName("a"), PinLevel.DEVICE, ttl_s=5).result(5).pin is not None
    now[0] += 6
    assert manager.get(ByName("a")).pin is None
    manager.close()


def test_new_content_is_a_new_version_and_requests_in_flight_keep_theirs(
    manager: AdapterManager, loader: MemoryLoader
) -> None:
    """A changed file becomes current at the next look; a lease holds what it had; a pin moves along."""
    load(manager, "/a")
    manager.pin(ByName("a"), PinLevel.DEVICE).result(5)
    old = resolve(manager, by("a"))
    lease = manager.acquire(old).result(5)
    loader.folders["/a"] = ("a2", 10)
    assert resolve(manager, by("a"))[0].applied.digest == "sha256:a2"
    info = manager.get(ByName("a"))
    assert (info.current_digest, info.pin is not None) == ("sha256:a2", True)
    assert [version.digest for version in info.versions] == ["sha256:a2", "sha256:a"]
    assert set(lease.weights) == {"sha256:a"}
    lease.release()
    assert resolve(manager, AdapterUse(ByDigest("sha256:a")))[0].applied.digest == "sha256:a"


def test_broken_new_content_leaves_the_old_version_current(manager: AdapterManager, loader: MemoryLoader) -> None:
    """The request that notices fails; when the file is mended, all is well."""
    load(manager, "/a")
    loader.folders["/a"] = ("bad", 10)
    with pytest.raises(AdapterMalformedError):
        resolve(manager, by("a"))
    assert manager.get(ByName("a")).current_digest == "sha256:a"
    loader.folders["/a"] = ("a", 10)
    assert resolve(manager, by("a"))[0].applied.digest == "sha256:a"


def test_expected_digest_is_exact(manager: AdapterManager) -> None:
    """A request that expects another version gets an error, never something else."""
    load(manager, "/a")
    with pytest.raises(AdapterDigestMismatchError):
        resolve(manager, AdapterUse(ByName("a"), expected_digest="sha256:b"))


def test_one_adapter_twice_is_invalid_by_any_selector(manager: AdapterManager) -> None:
    """The same version by name and by path is still the same."""
    load(manager, "/a")
    with pytest.raises(InvalidRequestError):
        resolve(manager, by("a"), AdapterUse(AdapterSource("/a")))


def test_names_belong_to_one_source_and_ids_never_rebind(manager: AdapterManager) -> None:
    """Another source under a taken name needs replace; a taken id is refused in any case."""
    load(manager, "/a", name="x", id=5)
    with pytest.raises(AdapterAlreadyExistsError):
        load(manager, "/b", name="x")
    with pytest.raises(AdapterAlreadyExistsError):
        load(manager, "/b", id=5)
    assert load(manager, "/b", name="x", replace=True) == "x"
    assert manager.get(ByName("x")).current_digest == "sha256:b"
    with pytest.raises(AdapterNotFoundError):
        manager.get(ById(5))


def test_a_leased_version_is_not_unloaded_unless_drained(manager: AdapterManager) -> None:
    """Without drain it is refused; with drain the name goes at once and the bytes with the last lease."""
    load(manager, "/a")
    lease = manager.acquire(resolve(manager, by("a"))).result(5)
    with pytest.raises(AdapterInUseError):
        manager.unload(ByName("a"))
    assert manager.unload(ByName("a"), drain=True) == 0
    assert manager.cache_info().used_bytes == 10
    lease.release()
    lease.release()
    assert manager.cache_info().used_bytes == 0


def test_leases_wait_for_leases_and_no_thread_waits_with_them(manager: AdapterManager) -> None:
    """What only others' leases block is granted when they end; a cancelled wait leaves nothing behind."""
    for name in "abcdef":
        load(manager, f"/{name}")
    held = manager.acquire(resolve(manager, by("a"), by("b"))).result(5)
    waiting = [manager.acquire(resolve(manager, by(name))) for name in "cc"]
    first = waiting[0].result(5)
    blocked = manager.resolve([by("d"), by("e"), by("f")])
    time.sleep(0.05)
    assert not blocked.done()
    blocked.cancel()
    held.release()
    first.release()
    waiting[1].result(5).release()
    assert len(resolve(manager, by("d"), by("e"), by("f"))) == 3
    with pytest.raises(CancelledError):
        blocked.result(0)


def test_together_too_large_is_refused_at_once(manager: AdapterManager) -> None:
    """Four adapters that each fit, and together never do."""
    with pytest.raises(CacheExhaustedError):
        resolve(manager, *[AdapterUse(AdapterSource(f"/{name}")) for name in "abcd"])


def test_many_threads_leave_the_books_in_order(manager: AdapterManager) -> None:
    """Random loads, uses, pins and unloads from eight threads: only domain errors, and nothing is left leased."""
    for name in "abcdef":
        load(manager, f"/{name}")
    stop_s = time.monotonic() + 2

    def worker(seed: int) -> int:
        rng, done = random.Random(seed), 0
        while time.monotonic() < stop_s:
            names = rng.sample("abcdef", rng.randint(1, 3))
            try:
                kind = rng.random()
                if kind < 0.7:
                    adapters = manager.resolve([AdapterUse(AdapterSource(f"/{name}")) for name in names]).result(10)
                    with manager.acquire(adapters).result(10) as lease:
                        assert len(lease.weights) == len(names)
                elif kind < 0.8:
                    manager.pin(ByName(names[0]), PinLevel.HOST).result(10)
                elif kind < 0.9:
                    manager.unpin(ByName(names[0]))
                else:
                    manager.unload(ByName(names[0]), drain=rng.random() < 0.5)
                manager.check_integrity()
                done += 1
            except LoraServerError:
                continue
        for name in "abcdef":
            try:
                manager.unpin(ByName(name))
            except AdapterNotFoundError:
                continue
        return done

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(worker, range(8))) > 50
    for info in manager.list():
        manager.unpin(ByName(info.name))
        manager.unload(ByName(info.name))
    assert manager.cache_info().used_bytes == 0
    assert threading.active_count() < 50


class HubLoader(MemoryLoader):
    """Its hub has one adapter, which is at /h once it was fetched."""

    def locate(self, path: str | Path) -> Path:
        if isinstance(path, str) and path.startswith("hub://"):
            self.folders["/h"] = ("h", 10)
            return Path("/h")
        return Path(path)


def test_a_download_that_was_removed_is_fetched_again() -> None:
    """An evicted adapter of the hub comes back by its name, though its files are gone; unloaded, they are swept."""
    loader = HubLoader()
    kept: list[list[Path]] = []

    def sweep(needed: Callable[[], Collection[Path]], grace_s: float) -> int:
        kept.append(list(needed()))
        return 0

    manager = AdapterManager(CacheConfig(budget_bytes=10, device_slots=2), loader, sweep_downloads=sweep)
    manager.load(AdapterSource("hub://me/h@main", name="mine")).result(5)
    while not kept:  # on a thread of its own
        time.sleep(0.01)
    manager.load(AdapterSource("/a")).result(5)
    del loader.folders["/h"]
    assert manager.resolve([AdapterUse(ByName("mine"))]).result(5)[0].applied.digest == "sha256:h"
    manager.unload(ByName("mine"))
    manager.close()
    assert kept[0] == [Path("/h")]
    manager.check_integrity()

"""The manager under true threads: random operations at random moments, and what must hold when all have gone home.

The machine beside this file tries interleavings of whole tasks; here the interpreter also switches inside them.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from lora_server.adapters.api import AdapterLease, LoadedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import LoraServerError
from lora_server.types import AdapterSource, AdapterUse, ByName, PinLevel

from tests.unit.adapters.memory_loader import MemoryLoader

THREADS = 8
NAMES = "abcdef"
WAIT_S = 0.02
LOST_S = 10.0
ROUNDS = 4 if settings.default.max_examples < 10_000 else 100
SECONDS_A_ROUND = 1.0


class SlowLoader(MemoryLoader):
    """Reads take a moment, so that they overlap."""

    def load(self, folder: Path) -> LoadedAdapter:
        time.sleep(random.random() * 0.002)
        return super().load(folder)


class User:
    """One thread's random operations; counts what it did, and keeps every future and every fault."""

    def __init__(self, manager: AdapterManager, loader: SlowLoader, seed: int) -> None:
        self._manager = manager
        self._loader = loader
        self._rng = random.Random(seed)
        self.futures: list[Future[Any]] = []
        self.faults: list[BaseException] = []
        self.done = 0

    def run(self, stop_s: float) -> None:
        """Acts until *stop_s*, monotonic; only domain errors are expected."""
        actions = [self.use] * 6 + [self.load, self.pin, self.unpin, self.unload, self.change, self.look]
        while time.monotonic() < stop_s:
            try:
                self._rng.choice(actions)()
            except (LoraServerError, CancelledError):
                pass
            except BaseException as fault:
                self.faults.append(fault)
                return
            self.done += 1

    def use(self) -> None:
        """Resolves, acquires, holds for a moment, releases; gives up at any point if it takes long."""
        names = self._rng.sample(NAMES, self._rng.randint(1, 3))
        uses = [self._rng.choice([AdapterUse(ByName(n)), AdapterUse(AdapterSource(f"/{n}"))]) for n in names]
        adapters = self._wait(self._manager.resolve(uses))
        if adapters is None:
            return
        lease: AdapterLease | None = self._wait(self._manager.acquire(adapters))
        if lease is None:
            return
        with lease:
            assert set(lease.weights) == {each.applied.digest for each in adapters}
            assert all(digest in self._manager._cache for digest in lease.weights), "a leased version was evicted"
            time.sleep(self._rng.random() * 0.002)

    def load(self) -> None:
        name = self._rng.choice([None, "x"])
        self._wait(self._manager.load(AdapterSource(f"/{self._rng.choice(NAMES)}", name=name), replace=True))

    def pin(self) -> None:
        ttl_s = self._rng.choice([0.01, 0.05])  # an end, or the pins would soon leave no room for anything else
        level = self._rng.choice(list(PinLevel))
        self._wait(self._manager.pin(ByName(self._rng.choice(NAMES)), level, ttl_s))

    def unpin(self) -> None:
        self._manager.unpin(ByName(self._rng.choice(NAMES)))

    def unload(self) -> None:
        self._manager.unload(ByName(self._rng.choice([*NAMES, "x"])), drain=self._rng.random() < 0.5)

    def change(self) -> None:
        content = self._rng.choice([*"abcdefgh", "bad"])
        self._loader.folders[f"/{self._rng.choice(NAMES)}"] = (content, 5 + 5 * (ord(content[0]) % 3))

    def look(self) -> None:
        self._manager.list()
        self._manager.cache_info()
        self._manager.check_integrity()

    def _wait(self, future: Future[Any]) -> Any:
        """The result, or None if it took too long and was given up; sometimes it is given up at once.

        Leases here last milliseconds and pins hundredths of a second: who waits for long was forgotten.
        """
        self.futures.append(future)
        patience_s = self._rng.choice([0.0, WAIT_S, WAIT_S, LOST_S])
        try:
            return future.result(patience_s)
        except TimeoutError:
            if patience_s == LOST_S and not future.done():
                raise AssertionError(f"nobody woke this: {self._manager.waiting_count} wait") from None
            if future.cancel():
                return None
            return future.result()  # it came in between, and a lease must not be lost


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Lets the interpreter switch threads a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.00005)
    yield
    sys.setswitchinterval(before)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_many_threads_leave_nothing_behind(seed: int) -> None:
    """No lease is left, no future is open, the bytes add up, and only domain errors came."""
    loader = SlowLoader()
    manager = AdapterManager(CacheConfig(budget_bytes=40, max_adapters=5, device_slots=4, max_pinned_share=1), loader)
    users = [User(manager, loader, 1000 * seed + k) for k in range(THREADS)]
    stop_s = time.monotonic() + SECONDS_A_ROUND
    threads = [threading.Thread(target=user.run, args=[stop_s]) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert [fault for user in users for fault in user.faults] == []
    _until_idle(manager)
    assert all(future.done() for user in users for future in user.futures)
    assert manager.leased_count == manager.waiting_count == manager.reading_count == 0
    manager.check_integrity()
    assert manager.cache_info().used_bytes == sum(entry.size_bytes for entry in manager._cache._entries.values())
    assert sum(user.done for user in users) > THREADS
    manager.close()


def _until_idle(manager: AdapterManager) -> None:
    """Waits for what was given up and is still being read."""
    end_s = time.monotonic() + 10
    while manager.reading_count or manager.waiting_count or manager.leased_count:
        assert time.monotonic() < end_s, "something is never let go"
        time.sleep(0.01)

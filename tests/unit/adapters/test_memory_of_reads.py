"""What was read is let go of when it is evicted, not when the collector of cycles comes by."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.types import AdapterSource, AdapterUse, ByName

from tests.unit.adapters.memory_loader import MemoryLoader


class _Watching(MemoryLoader):
    """Remembers, weakly, all weights that it read."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[weakref.ref[object]] = []

    def load(self, folder: Path) -> LoadedAdapter:
        loaded = super().load(folder)
        self.weights.append(weakref.ref(loaded.weights))
        return loaded

    def alive(self) -> int:
        """How many are still in memory."""
        return sum(each() is not None for each in self.weights)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nobody knows of goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_evicted_weights_go_at_once(no_collector: None) -> None:
    """After loads, requests and leases, those of the cache are alive, and no others."""
    loader = _Watching()
    config = CacheConfig(budget_bytes=30, max_adapters=10, device_slots=4, max_pinned_share=1)
    manager = AdapterManager(config, loader)
    try:
        for _ in range(2):
            for name in "abcdef":
                manager.load(AdapterSource(f"/{name}", name=name), replace=True).result(5)
                manager.resolve([AdapterUse(ByName(name))]).result(5)
        until_s = time.monotonic() + 5
        while loader.alive() > 3 and time.monotonic() < until_s:  # a worker lets go of its work a moment later
            time.sleep(0.01)
        assert len(loader.weights) == 12
        assert loader.alive() == 3
    finally:
        manager.close()

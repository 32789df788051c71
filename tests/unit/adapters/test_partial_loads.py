"""A partial load is a permission that stays with the adapter: for later reads, and never for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import AdapterIncompatibleError
from lora_server.types import AdapterSource, AdapterUse, ByName, LoadReport

from tests.unit.adapters.memory_loader import FakeWeights, MemoryLoader


class StrictLoader(MemoryLoader):
    """Folder `/a` has one tensor too many; counts what was read in part."""

    partial_loads = 0

    def load(self, folder: Path) -> LoadedAdapter:
        if str(folder) == "/a":
            raise AdapterIncompatibleError("a", "tiny", "the model has no such module", "stray")
        return super().load(folder)

    def load_partial(self, folder: Path) -> LoadedAdapter:
        self.partial_loads += 1
        content, size = self.folders[str(folder)]
        report = LoadReport("kohya", ("lora",), 4, 4, 4, 4, (), size, content, num_unmatched_keys=1)
        return LoadedAdapter(f"sha256:{content}", FakeWeights(size), self.signature(folder), report=report)


@pytest.fixture
def loader() -> StrictLoader:
    """Six adapters of 10 bytes."""
    return StrictLoader()


@pytest.fixture
def manager(loader: StrictLoader) -> Iterator[AdapterManager]:
    """A manager with room for one."""
    made = AdapterManager(CacheConfig(budget_bytes=10, max_adapters=10, device_slots=4), loader)
    yield made
    made.check_integrity()
    made.close()


def test_strict_fails_and_leaves_nothing(manager: AdapterManager) -> None:
    """Without permission, nothing is registered, neither by a load nor by a request's path."""
    with pytest.raises(AdapterIncompatibleError):
        manager.load(AdapterSource("/a")).result(5)
    with pytest.raises(AdapterIncompatibleError):
        manager.resolve([AdapterUse(AdapterSource("/a"))]).result(5)
    assert manager.list() == ()


def test_permission_stays_for_rereads_and_paths(manager: AdapterManager, loader: StrictLoader) -> None:
    """An adapter that was loaded in part is read in part again when it was evicted, by name and by path."""
    name = manager.load(AdapterSource("/a"), allow_partial=True).result(5).adapter.name
    manager.load(AdapterSource("/b")).result(5)  # evicts it
    (resolved,) = manager.resolve([AdapterUse(ByName(name))]).result(5)
    with manager.acquire([resolved]).result(5):
        pass
    manager.load(AdapterSource("/b")).result(5)
    manager.resolve([AdapterUse(AdapterSource("/a"))]).result(5)
    assert loader.partial_loads == 3
    report = manager.get(ByName(name)).versions[0].report
    assert report is not None
    assert report.num_unmatched_keys == 1


def test_a_strict_load_of_what_was_loaded_in_part_refuses_and_changes_nothing(manager: AdapterManager) -> None:
    """The answer of a load does not depend on what somebody else allowed before; and it takes nothing from them."""
    name = manager.load(AdapterSource("/a"), allow_partial=True).result(5).adapter.name
    with pytest.raises(AdapterIncompatibleError):
        manager.load(AdapterSource("/a")).result(5)
    assert manager.resolve([AdapterUse(ByName(name))]).result(5)

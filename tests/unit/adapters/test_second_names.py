"""Ids of a folder's second name."""

from __future__ import annotations

from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.types import AdapterSource, ByName

from tests.unit.adapters.memory_loader import MemoryLoader


def test_loading_a_second_name_again_gives_it_no_more_ids() -> None:
    """The path's own id is the first name's; the second one's is made once."""
    manager = AdapterManager(CacheConfig(budget_bytes=100, device_slots=4), MemoryLoader())
    for _ in range(3):
        for name in ("one", "two"):
            manager.load(AdapterSource("/a", name=name)).result(5)
    assert [len(manager.get(ByName(name)).ids) for name in ("one", "two")] == [1, 1]
    manager.check_integrity()
    manager.close()

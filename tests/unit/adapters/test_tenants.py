"""Adapters that are bound to tenants: for everybody else they do not exist, whatever the selector, cached or not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import AdapterNotFoundError, LoraServerError
from lora_server.types import AdapterSource, AdapterUse, ByDigest, ById, ByName

from tests.unit.adapters.memory_loader import MemoryLoader


@pytest.fixture
def loader() -> MemoryLoader:
    """Six adapters of 10 bytes."""
    return MemoryLoader()


@pytest.fixture
def manager(loader: MemoryLoader) -> Iterator[AdapterManager]:
    """A manager with `mine` (/a, bound to acme) and `ours` (/b, open)."""
    made = AdapterManager(CacheConfig(budget_bytes=20, max_adapters=10, device_slots=4, max_pinned_share=1), loader)
    made.load(AdapterSource("/a", 7, "mine"), tenants=frozenset({"acme"})).result(5)
    made.load(AdapterSource("/b", None, "ours")).result(5)
    yield made
    made.check_integrity()
    made.close()


SELECTORS = [
    ByName("mine"),
    ById(7),
    ByDigest("sha256:a"),
    AdapterSource("/a"),
    AdapterSource("/a", None, "another-name"),
    AdapterSource("/a", 99),
    AdapterSource("/c", None, "mine"),
    AdapterSource("/c", 7),
]


def names(manager: AdapterManager, use: AdapterUse, tenant: str | None) -> list[str]:
    """Resolves one use for a tenant; the names that it got."""
    return [each.applied.name for each in manager.resolve([use], tenant).result(5)]


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_others_do_not_find_it(
    manager: AdapterManager, loader: MemoryLoader, selector: ByName | ById | ByDigest | AdapterSource, is_cached: bool
) -> None:
    """The same error as for what nobody has; nothing is read, registered or told, though it is in the cache."""
    if not is_cached:
        for path in "de":
            manager.load(AdapterSource(f"/{path}")).result(5)
    before = (list(loader.loads), [info.name for info in manager.list()])
    with pytest.raises(AdapterNotFoundError) as error:
        names(manager, AdapterUse(selector), "umbrella")
    assert "acme" not in str(error.value)
    assert (loader.loads, [info.name for info in manager.list()]) == before


def test_its_tenants_and_the_operator_find_it(manager: AdapterManager) -> None:
    """By name, digest and path; what is open is open to all."""
    for tenant in ("acme", None):
        for selector in (ByName("mine"), ByDigest("sha256:a"), AdapterSource("/a")):
            assert names(manager, AdapterUse(selector), tenant) == ["mine"]
    assert names(manager, AdapterUse(ByName("ours")), "umbrella") == ["ours"]


def test_a_second_name_of_a_bound_folder_is_bound(manager: AdapterManager) -> None:
    """A tenant's own use by path under a new name opens it to nobody."""
    names(manager, AdapterUse(AdapterSource("/a", None, "second")), "acme")
    with pytest.raises(AdapterNotFoundError):
        names(manager, AdapterUse(ByName("second")), "umbrella")


def test_a_binding_changes_only_when_it_is_said(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Loading again, new weights and another source keep it; an empty list ends it; a failed load changes nothing."""
    loader.folders["/a"] = ("a2", 10)
    assert manager.load(AdapterSource("/a", None, "mine")).result(5).adapter.tenants == {"acme"}
    assert manager.load(AdapterSource("/d", None, "mine"), replace=True).result(5).adapter.tenants == {"acme"}
    loader.folders["/d"] = ("bad", 10)
    with pytest.raises(LoraServerError):
        manager.load(AdapterSource("/d", None, "mine"), tenants=frozenset()).result(5)
    assert manager.get(ByName("mine")).tenants == {"acme"}
    loader.folders["/d"] = ("d", 10)
    assert manager.load(AdapterSource("/d", None, "mine"), tenants=frozenset()).result(5).adapter.tenants is None
    names(manager, AdapterUse(ByName("mine")), "umbrella")


def test_a_binding_is_asked_again_for_what_is_warm(manager: AdapterManager) -> None:
    """A tenant that used it a moment ago, and is let in no more, does not get it from the cache."""
    names(manager, AdapterUse(ByName("ours")), "umbrella")
    manager.load(AdapterSource("/b", None, "ours"), tenants=frozenset({"acme"})).result(5)
    with pytest.raises(AdapterNotFoundError):
        names(manager, AdapterUse(ByName("ours")), "umbrella")


def test_a_binding_made_while_another_adapter_is_read_counts(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Who may use what is asked when all is there, not only when the request came."""
    with loader.held_back("/e"):
        resolving = manager.resolve([AdapterUse(ByName("ours")), AdapterUse(AdapterSource("/e"))], "umbrella")
        time.sleep(0.1)
        manager.load(AdapterSource("/b", None, "ours"), tenants=frozenset({"acme"})).result(5)
    with pytest.raises(AdapterNotFoundError):
        resolving.result(5)


def test_a_file_of_a_bound_folder_is_bound(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Its other name is no way around; nor is the folder of a file that is bound."""
    loader.folders |= {"/a/x.safetensors": ("ax", 10), "/d/y.safetensors": ("dy", 10), "/d": ("d", 10)}
    manager.load(AdapterSource("/d/y.safetensors"), tenants=frozenset({"acme"})).result(5)
    for path in ("/a/x.safetensors", "/d"):
        with pytest.raises(AdapterNotFoundError):
            names(manager, AdapterUse(AdapterSource(path)), "umbrella")
        names(manager, AdapterUse(AdapterSource(path, None, "own")), "acme")
        with pytest.raises(AdapterNotFoundError):
            names(manager, AdapterUse(ByName("own")), "umbrella")
        manager.unload(ByName("own"))

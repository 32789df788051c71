"""Names and ids that requests make by sources: for their tenant alone, bounded, and never in an operator's way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.naming import stable_adapter_id
from lora_server.config import CacheConfig
from lora_server.errors import AdapterAlreadyExistsError, AdapterNotFoundError, LoraServerError
from lora_server.types import AdapterSource, AdapterUse, ById, ByName, PinLevel, Selector, Viewer

from tests.unit.adapters.memory_loader import MemoryLoader

EVIL, GOOD = Viewer("evil", is_operator=False), Viewer("good", is_operator=False)
MOST = 4


@pytest.fixture
def loader() -> MemoryLoader:
    """Fifty adapters of 10 bytes."""
    return MemoryLoader({f"/{k}": (f"c{k}", 10) for k in range(50)})


@pytest.fixture
def manager(loader: MemoryLoader) -> Iterator[AdapterManager]:
    """A manager with `neon`, which keeps four names of a tenant's."""
    config = CacheConfig(budget_bytes=200, device_slots=4, max_on_demand_adapters=MOST)
    made = AdapterManager(config, loader)
    made.load(AdapterSource("/0", name="neon")).result(5)
    yield made
    made.check_integrity()
    made.close()


def draw(manager: AdapterManager, *selectors: Selector, tenant: str = "evil") -> list[tuple[str, str]]:
    """Resolves and leases; the names and digests."""
    resolved = manager.resolve([AdapterUse(each) for each in selectors], tenant).result(5)
    manager.acquire(resolved).result(5).release()
    return [(each.applied.name, each.applied.digest) for each in resolved]


def listed(manager: AdapterManager, viewer: Viewer) -> list[str]:
    """The names that somebody finds."""
    return [info.name for info in manager.list(viewer)]


def test_what_a_use_names_is_found_by_its_tenant_alone(manager: AdapterManager) -> None:
    """By name, id and version; by another tenant not at all, and an operator does nothing with it by mistake."""
    draw(manager, AdapterSource("/1", 5, "brand"))
    for selector in (ByName("brand"), ById(5)):
        assert draw(manager, selector) == [("brand", "sha256:c1")]
        with pytest.raises(AdapterNotFoundError):
            manager.get(selector, GOOD)
        with pytest.raises(AdapterNotFoundError):
            manager.pin(selector, PinLevel.HOST, viewer=Viewer("ops")).result(5)
        assert manager.get(selector, Viewer("ops")).tenants == {"evil"}, "an operator is shown whose it is"
        with pytest.raises(LoraServerError):
            draw(manager, selector, tenant="good")
    assert [listed(manager, viewer) for viewer in (EVIL, GOOD, Viewer("ops"))] == [
        ["brand", "neon"],
        ["neon"],
        ["neon"],
    ]
    assert draw(manager, AdapterSource("/2", 5, "brand"), tenant="good") == [("brand", "sha256:c2")]
    assert draw(manager, ByName("brand")) == [("brand", "sha256:c1")]


def test_an_operator_takes_a_name_that_a_use_has(manager: AdapterManager) -> None:
    """Without replace; from then on it means the operator's for everybody, the tenant included."""
    draw(manager, AdapterSource("/1", 5, "brand"))
    manager.load(AdapterSource("/2", 5, "brand")).result(5)
    for tenant in ("evil", "good"):
        for selector in (ByName("brand"), ById(5)):
            assert draw(manager, selector, tenant=tenant) == [("brand", "sha256:c2")]
    assert [info.current_digest for info in manager.list(EVIL) if info.name == "brand"] == ["sha256:c2"]
    with pytest.raises(AdapterAlreadyExistsError):
        draw(manager, AdapterSource("/1", None, "brand"))


def test_names_and_ids_are_bounded_and_the_least_used_are_forgotten(manager: AdapterManager) -> None:
    """The cache holds nothing for what is forgotten; what is used stays; other tenants have a bound of their own."""
    draw(manager, AdapterSource("/49"), tenant="good")
    for k in range(1, 30):
        draw(manager, AdapterSource(f"/{k}", None, f"evil-{k}"))
        draw(manager, ByName("evil-1"))
    assert listed(manager, EVIL) == ["evil-1", "evil-27", "evil-28", "evil-29", "neon"]
    assert manager.cache_info().cached_adapters == MOST + 2
    assert listed(manager, GOOD) == ["49", "neon"]
    with pytest.raises(AdapterNotFoundError):
        draw(manager, ById(stable_adapter_id("/5")))


def test_ids_of_a_registered_adapter_do_not_grow(manager: AdapterManager) -> None:
    """An id that a use gives it is the tenant's own, and bounded too."""
    before = manager.get(ByName("neon")).ids
    for adapter_id in range(1000, 1030):
        assert draw(manager, AdapterSource("/0", adapter_id, "neon")) == [("neon", "sha256:c0")]
    assert manager.get(ByName("neon")).ids == before
    assert draw(manager, ById(1029)) == [("neon", "sha256:c0")]
    for adapter_id, tenant in ((1029, "good"), (1000, "evil")):
        with pytest.raises(AdapterNotFoundError):
            draw(manager, ById(adapter_id), tenant=tenant)
    draw(manager, AdapterSource("/1", 2000, "brand"))
    for adapter_id in range(2001, 2030):
        draw(manager, AdapterSource("/1", adapter_id, "brand"))
    assert len(manager.get(ByName("brand"), EVIL).ids) <= MOST + 1


REFUSED = [
    [AdapterSource("/1", None, "x"), AdapterSource("/1", None, "y")],
    [AdapterSource("/1", None, "x"), ByName("nobody")],
    [AdapterSource("/1", None, "x"), AdapterSource("/2", None, "x")],
    [AdapterSource("/1", 5, "x"), AdapterSource("/2", 5, "y")],
    [AdapterSource("/1", None, "x"), AdapterSource("/2", None, "neon")],
    [AdapterSource("/1", None, "x"), AdapterSource("/none")],
]


@pytest.mark.parametrize("selectors", REFUSED)
def test_a_refused_request_leaves_nothing(manager: AdapterManager, selectors: list[Selector]) -> None:
    """No name, no id, no version in the cache."""
    for _ in range(3):
        with pytest.raises(LoraServerError):
            draw(manager, *selectors)
    assert listed(manager, EVIL) == ["neon"]
    for ref in (ById(5), ById(stable_adapter_id("/1"))):
        with pytest.raises(AdapterNotFoundError):
            manager.get(ref, EVIL)
    assert manager.cache_info().cached_adapters == 1
    manager.load(AdapterSource("/3", 5, "x")).result(5)


def test_a_cancelled_request_leaves_nothing(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Though its read ends afterwards."""
    with loader.held_back("/1"):
        resolving = manager.resolve([AdapterUse(AdapterSource("/1", None, "x"))], "evil")
        resolving.cancel()
    manager.load(AdapterSource("/2")).result(5)
    assert listed(manager, EVIL) == ["2", "neon"]


def test_requests_in_flight_draw_what_was_forgotten_meanwhile(manager: AdapterManager) -> None:
    """A tenant may have more of them than names are kept."""
    resolved = [manager.resolve([AdapterUse(AdapterSource(f"/{k}"))], "evil").result(5) for k in range(1, 30)]
    for k, each in enumerate(resolved, 1):
        with manager.acquire(each).result(5) as lease:
            assert set(lease.weights) == {f"sha256:c{k}"}
    assert len(listed(manager, EVIL)) == MOST + 1


def test_where_there_is_one_tenant_its_names_are_the_operators_too(manager: AdapterManager) -> None:
    """A server without tokens: what a request has named can be shown, unloaded, pinned and loaded."""
    everybody = Viewer("default")
    draw(manager, AdapterSource("/1", 5), AdapterSource("/2"), AdapterSource("/3"), tenant="default")
    assert listed(manager, everybody) == ["1", "2", "3", "neon"]
    assert manager.pin(ByName("1"), PinLevel.HOST, viewer=everybody).result(5).pin is not None
    loaded = manager.load(AdapterSource("/2"), viewer=everybody).result(5)
    assert (loaded.adapter.name, loaded.load_time_s) == ("2", 0)
    assert manager.unload(ByName("3"), viewer=everybody) == 10
    assert listed(manager, GOOD) == ["1", "2", "neon"], "what was pinned and loaded is registered for everybody"
    assert manager.get(ById(5)).name == "1"
    manager.unpin(ByName("1"))

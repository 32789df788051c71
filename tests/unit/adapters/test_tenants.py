"""Adapters that are bound to tenants: for everybody else they do not exist, whatever the selector, cached or not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import AdapterNotFoundError, LoraServerError
from lora_server.types import AdapterSource, AdapterUse, ByDigest, ById, ByName, PinLevel, Selector, Viewer

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


BOUND_AND_NOBODYS: list[tuple[Selector, Selector]] = [
    (ByName("mine"), ByName("none")),
    (ById(7), ById(8)),
    (ByDigest("sha256:a"), ByDigest("sha256:0")),
    (AdapterSource("/a"), AdapterSource("/0")),
    (AdapterSource("/a", None, "another-name"), AdapterSource("/0", None, "another-name")),
    (AdapterSource("/a", 99), AdapterSource("/0", 99)),
    (AdapterSource("/a", 7, "mine"), AdapterSource("/0", 7, "mine")),
    (AdapterSource("/a/transformer"), AdapterSource("/0/transformer")),
    (AdapterSource("/a/x.safetensors"), AdapterSource("/0/x.safetensors")),
    (AdapterSource("/"), AdapterSource("/0")),
]
"""What is bound to others, and what nobody has, asked for in the same way."""


def names(manager: AdapterManager, use: AdapterUse, tenant: str | None) -> list[str]:
    """Resolves one use for a tenant; the names that it got."""
    return [each.applied.name for each in manager.resolve([use], tenant).result(5)]


def refused(manager: AdapterManager, use: AdapterUse, tenant: str | None = "umbrella") -> LoraServerError:
    """Resolves one use, which must fail; the error."""
    with pytest.raises(LoraServerError) as caught:
        names(manager, use, tenant)
    return caught.value


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize(("bound", "nobodys"), BOUND_AND_NOBODYS, ids=str)
def test_others_cannot_tell_it_from_what_nobody_has(
    manager: AdapterManager, loader: MemoryLoader, bound: Selector, nobodys: Selector, is_cached: bool
) -> None:
    """The same error to the letter, but for what was asked; nothing is read, registered or told, though it is warm."""
    loader.folders |= {"/a/transformer": ("at", 10), "/a/x.safetensors": ("ax", 10), "/": ("root", 10)}
    if not is_cached:
        for path in "de":
            manager.load(AdapterSource(f"/{path}")).result(5)
    before = (list(loader.loads), manager.cache_info(), [info.name for info in manager.list()])
    error, other = refused(manager, AdapterUse(bound)), refused(manager, AdapterUse(nobodys))
    asked, others = (getattr(each, "path", None) or str(each) for each in (bound, nobodys))
    assert type(error) is type(other)
    assert error.reason in ("ADAPTER_NOT_FOUND", "ADAPTER_SOURCE_NOT_FOUND")
    if isinstance(bound, AdapterSource):
        assert (str(error).replace(asked, others), error.metadata) == (str(other), {"path": asked})
    assert "acme" not in str(error)
    assert (loader.loads, manager.cache_info(), [info.name for info in manager.list()]) == before


@pytest.mark.parametrize("source", [AdapterSource("/c", None, "mine"), AdapterSource("/c", 7)])
def test_a_name_or_id_of_what_is_bound_to_others_is_free_for_a_tenant(
    manager: AdapterManager, source: AdapterSource
) -> None:
    """A conflict would tell that it is taken. The tenant alone finds what it calls so; for others nothing changes."""
    assert names(manager, AdapterUse(source), "umbrella") == [source.name or "c"]
    selector = ByName("mine") if source.name else ById(7)
    for tenant, digest in (("umbrella", "sha256:c"), ("acme", "sha256:a"), (None, "sha256:a")):
        (found,) = manager.resolve([AdapterUse(selector)], tenant).result(5)
        assert found.applied.digest == digest
    with pytest.raises(AdapterNotFoundError):
        names(manager, AdapterUse(selector), "third")


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


@pytest.mark.parametrize("way", [ByName("ours"), ById(5), ByDigest("sha256:b"), AdapterSource("/b"), ByName("alias")])
def test_a_binding_made_after_a_use_holds_for_every_selector(manager: AdapterManager, way: Selector) -> None:
    """For what a tenant has named itself, too: by its own name, its own id, and the version."""
    names(manager, AdapterUse(AdapterSource("/b", 5)), "umbrella")
    names(manager, AdapterUse(AdapterSource("/b", None, "alias")), "umbrella")
    names(manager, AdapterUse(way), "umbrella")
    manager.load(AdapterSource("/b", None, "ours"), tenants=frozenset({"acme"})).result(5)
    assert refused(manager, AdapterUse(way)).reason.endswith("NOT_FOUND")
    assert [each.name for each in manager.list(Viewer("umbrella", is_operator=False))] == []


def test_a_binding_closes_the_open_names_of_its_files(manager: AdapterManager) -> None:
    """Registered before or after it: bindings are of files, not of names."""
    manager.load(AdapterSource("/b", None, "bound"), tenants=frozenset({"acme"})).result(5)
    manager.load(AdapterSource("/b", None, "later"), tenants=frozenset()).result(5)
    for name in ("ours", "later"):
        refused(manager, AdapterUse(ByName(name)))
        with pytest.raises(AdapterNotFoundError):
            manager.get(ByName(name), Viewer("umbrella", is_operator=False))
        assert names(manager, AdapterUse(ByName(name)), "acme") == [name]
    manager.load(AdapterSource("/b", None, "bound"), tenants=frozenset()).result(5)
    assert names(manager, AdapterUse(ByName("ours")), "umbrella") == ["ours"]


def test_names_of_one_folder_may_be_bound_to_a_tenant_each(manager: AdapterManager) -> None:
    """An operator who says so lets in both, each under its name."""
    manager.load(AdapterSource("/a", None, "theirs"), tenants=frozenset({"umbrella"})).result(5)
    assert names(manager, AdapterUse(ByName("theirs")), "umbrella") == ["theirs"]
    assert names(manager, AdapterUse(AdapterSource("/a")), "umbrella") == ["theirs"]
    assert names(manager, AdapterUse(ByName("mine")), "acme") == ["mine"]
    assert refused(manager, AdapterUse(ByName("mine"))).reason == "ADAPTER_NOT_FOUND"


def test_a_binding_made_while_the_same_files_are_read_counts(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Between the look and the end of the read."""
    with loader.held_back("/e"):
        resolving = manager.resolve([AdapterUse(AdapterSource("/e", None, "early"))], "umbrella")
        time.sleep(0.1)
        binding = manager.load(AdapterSource("/e"), tenants=frozenset({"acme"}))
    binding.result(5)
    error = resolving.exception(5)
    accepted_before = error is None
    assert accepted_before or error.reason == "ADAPTER_SOURCE_NOT_FOUND"  # type: ignore[union-attr]
    for selector in (AdapterSource("/e"), ByName("early"), ByName("e"), ByDigest("sha256:e")):
        refused(manager, AdapterUse(selector))


def test_a_binding_made_while_a_request_waits_for_its_turn_counts(manager: AdapterManager) -> None:
    """What was resolved is not drawn; what is leased already is: that request began before."""
    (waiting,), (running,) = (
        manager.resolve([AdapterUse(AdapterSource("/b", None, name))], "umbrella").result(5) for name in ("w", "ours")
    )
    lease = manager.acquire([running]).result(5)
    manager.load(AdapterSource("/b", None, "ours"), tenants=frozenset({"acme"})).result(5)
    for resolved in (waiting, running):
        with pytest.raises(AdapterNotFoundError):
            manager.acquire([resolved]).result(5)
    lease.release()
    assert manager.leased_count == 0


def test_the_same_bytes_elsewhere_are_another_adapter(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Who has them needs no binding to have them; the digest alone leads to nothing, and tells nothing of the other."""
    loader.folders["/c"] = ("a", 10)
    refused(manager, AdapterUse(ByDigest("sha256:a")))
    assert names(manager, AdapterUse(AdapterSource("/c")), "umbrella") == ["c"]
    assert names(manager, AdapterUse(ByDigest("sha256:a")), "umbrella") == ["c"]
    assert names(manager, AdapterUse(ByDigest("sha256:a")), "acme") == ["mine"]
    (found,) = manager.resolve([AdapterUse(ByName("mine"))], "acme").result(5)
    manager.acquire([found]).result(5).release()
    (copy,) = manager.list(Viewer("umbrella", is_operator=False))[:1]
    assert (copy.name, copy.versions[0].last_use_time_s) == ("c", None)


def test_an_error_of_a_request_names_nothing_of_others(manager: AdapterManager, loader: MemoryLoader) -> None:
    """A pin that cannot follow new weights: what is pinned besides is not told."""
    manager.pin(ByName("mine"), PinLevel.HOST).result(5)
    manager.pin(ByName("ours"), PinLevel.HOST).result(5)
    loader.folders["/b"] = ("b2", 15)
    error = refused(manager, AdapterUse(ByName("ours")))
    assert error.reason == "CACHE_EXHAUSTED"
    assert "mine" not in f"{error} {error.metadata}"


def test_a_file_of_a_bound_folder_is_bound(manager: AdapterManager, loader: MemoryLoader) -> None:
    """Its other name is no way around; nor is the folder of a file that is bound."""
    loader.folders |= {"/a/x.safetensors": ("ax", 10), "/d/y.safetensors": ("dy", 10), "/d": ("d", 10)}
    manager.load(AdapterSource("/d/y.safetensors"), tenants=frozenset({"acme"})).result(5)
    for path in ("/a/x.safetensors", "/d"):
        assert refused(manager, AdapterUse(AdapterSource(path))).reason == "ADAPTER_SOURCE_NOT_FOUND"
        names(manager, AdapterUse(AdapterSource(path, None, "own")), "acme")
        with pytest.raises(AdapterNotFoundError):
            names(manager, AdapterUse(ByName("own")), "umbrella")
        manager.unload(ByName("own"), viewer=Viewer("acme"))

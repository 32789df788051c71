"""Bindings and switched links: what a bound path leads to is bound from that moment on, whoever looks first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.refusals import nothing_at
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import CacheConfig
from lora_server.errors import AdapterNotFoundError, AdapterSourceForbiddenError, AdapterSourceNotFoundError
from lora_server.types import AdapterSource, AdapterUse, ById, ByName, Selector

from tests.stateful.file_loader import FileLoader
from tests.unit.adapters.test_switched_links import WAYS, WEIGHTS, folder_link, switch, write

ACME = frozenset({"acme"})


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[AdapterManager]:
    """Over a root with two versions."""
    for version in ("v1", "v2"):
        write(tmp_path / version, version)
    made = AdapterManager(CacheConfig(budget_bytes=1000, device_slots=9), FileLoader(AdapterRoots([tmp_path])))
    yield made
    made.check_integrity()
    made.close()


def drawn(manager: AdapterManager, selector: Selector, tenant: str) -> str:
    """The digest that a tenant's request resolves to and leases."""
    (found,) = manager.resolve([AdapterUse(selector)], tenant).result(5)
    manager.acquire([found]).result(5).release()
    return found.applied.digest


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_bound_path_leads_to_now_is_bound(
    manager: AdapterManager, tmp_path: Path, way: Callable[[Path], Path], relative: bool
) -> None:
    """By the path and by its target, before its own tenant has asked for it and after."""
    path = way(tmp_path)
    name = str(path.relative_to(tmp_path)) if relative else str(path)
    first = manager.load(AdapterSource(name, name="style"), tenants=ACME).result(5).adapter.current_digest
    for link, target in WAYS[way]:
        switch(tmp_path / link, target)
    targets = [str((tmp_path / link).resolve()) for link, _ in WAYS[way]]
    asked = [name, str(path), *(each for each in targets if Path(each).is_dir() or each.endswith(".safetensors"))]
    for _ in range(2):
        for each in asked:
            with pytest.raises(AdapterSourceNotFoundError) as refused:
                drawn(manager, AdapterSource(each), "umbrella")
            assert str(refused.value) == str(nothing_at(each))
        assert drawn(manager, ByName("style"), "acme") != first


def test_what_a_tenants_request_has_named_is_taken_from_it_when_it_is_bound(
    manager: AdapterManager, tmp_path: Path
) -> None:
    """By a link that leads there, as by a binding of the place itself."""
    manager.load(AdapterSource(str(folder_link(tmp_path)), name="style"), tenants=ACME).result(5)
    drawn(manager, AdapterSource(str(tmp_path / "v2"), name="mine"), "umbrella")
    switch(tmp_path / "current", "v2")
    with pytest.raises(AdapterNotFoundError):
        drawn(manager, ByName("mine"), "umbrella")


@pytest.mark.parametrize("by_id", [False, True])
def test_a_name_whose_path_leads_to_what_is_bound_is_not_found(
    manager: AdapterManager, tmp_path: Path, by_id: bool
) -> None:
    """In the words of an unknown one; nothing is read for it, and who may use both gets what is there now."""
    open_to_all = manager.load(AdapterSource(str(folder_link(tmp_path)), name="open")).result(5).adapter
    bound = manager.load(AdapterSource(str(tmp_path / "v2"), name="style"), tenants=ACME).result(5).adapter
    switch(tmp_path / "current", "v2")
    reads = manager.cache_info().misses
    selector: ByName | ById = ById(open_to_all.ids[0]) if by_id else ByName("open")
    with pytest.raises(AdapterNotFoundError) as refused:
        drawn(manager, selector, "umbrella")
    assert str(refused.value) == str(AdapterNotFoundError(open_to_all.ids[0] if by_id else "open"))
    assert manager.cache_info().misses == reads
    assert drawn(manager, selector, "acme") == bound.current_digest


def test_a_tenants_own_path_follows_its_link_too(manager: AdapterManager, tmp_path: Path) -> None:
    """By the path and by the name that it got; others have nothing of it."""
    path = str(folder_link(tmp_path))
    first = drawn(manager, AdapterSource(path, name="mine"), "umbrella")
    switch(tmp_path / "current", "v2")
    second = drawn(manager, ByName("mine"), "umbrella")
    assert second != first
    switch(tmp_path / "current", "v1")
    assert drawn(manager, AdapterSource(path, name="mine"), "umbrella") == first
    assert manager.list() == ()


def test_two_snapshots_that_share_a_blob_are_one_file(tmp_path: Path) -> None:
    """As in the cache of the hub's library: a link that is named as weights, to a file that is not."""
    snapshots, blobs = tmp_path / "snapshots", tmp_path / "blobs"
    for folder in (blobs, snapshots / "a", snapshots / "b"):
        folder.mkdir(parents=True)
    for number in "12":
        (blobs / number).write_text(number)
    for snapshot in "ab":
        for number in "12":
            (snapshots / snapshot / f"style{number}.safetensors").symlink_to(f"../../blobs/{number}")
    manager = AdapterManager(CacheConfig(budget_bytes=1000, device_slots=9), FileLoader(AdapterRoots([tmp_path])))
    manager.load(AdapterSource("snapshots/a/style1.safetensors", name="style"), tenants=ACME).result(5)
    for path in ("snapshots/a/style1.safetensors", "snapshots/b/style1.safetensors"):
        with pytest.raises(AdapterSourceNotFoundError):
            drawn(manager, AdapterSource(path), "umbrella")
    for path in ("snapshots/a/style2.safetensors", "snapshots/b/style2.safetensors"):
        drawn(manager, AdapterSource(path), "umbrella")
    manager.check_integrity()
    manager.close()


def test_a_link_into_the_servers_own_folders_leads_nowhere(tmp_path: Path) -> None:
    """Whatever it is called; the server itself reads there."""
    own = tmp_path / "own"
    write(own / "copy", "x")
    (own / "blob").write_text("x")
    (tmp_path / "a.safetensors").symlink_to(own / "blob")
    (tmp_path / "b.safetensors").symlink_to(own / "copy" / WEIGHTS)
    (tmp_path / "c").symlink_to(own / "copy")
    roots = AdapterRoots([tmp_path], own=[own])
    for path in ("a.safetensors", "b.safetensors", "c", "own/copy", str(own / "copy")):
        with pytest.raises(AdapterSourceForbiddenError):
            roots.locate(path)
    assert roots.locate(own / "copy") == own / "copy"


def test_an_inode_of_what_was_removed_binds_nothing(manager: AdapterManager, tmp_path: Path) -> None:
    """A file system gives it to the next file; here a link stands in for that."""
    bound, later = tmp_path / "bound.safetensors", tmp_path / "later.safetensors"
    bound.write_text("x")
    manager.load(AdapterSource(str(bound), name="style"), tenants=ACME).result(5)
    bound.rename(later)
    loaded = manager.load(AdapterSource(str(later), name="later")).result(5).adapter
    assert loaded.tenants is None
    assert drawn(manager, AdapterSource(str(later)), "umbrella") == loaded.current_digest

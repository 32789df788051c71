"""A link that is switched makes a new version as an overwrite does, and `load --replace` always reads anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.naming import stable_adapter_id
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import CacheConfig
from lora_server.errors import AdapterAlreadyExistsError, AdapterError, AdapterMalformedError
from lora_server.types import AdapterSource, AdapterUse, ByName, PinLevel

from tests.stateful.file_loader import FileLoader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[AdapterManager]:
    """Over a root in which anything may be."""
    made = AdapterManager(CacheConfig(budget_bytes=1000, device_slots=9), FileLoader(AdapterRoots([tmp_path])))
    yield made
    made.check_integrity()
    made.close()


def write(folder: Path, text: str) -> None:
    """An adapter of two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_text(text)


def switch(link: Path, target: str) -> None:
    """Lets a link lead elsewhere in one moment, as `ln -sfn` does."""
    (link.parent / "new").symlink_to(target)
    (link.parent / "new").replace(link)


def folder_link(root: Path) -> Path:
    """`current -> v1`."""
    switch(root / "current", "v1")
    return root / "current"


def kubernetes(root: Path) -> Path:
    """A mounted volume: `files -> ..data/files`, `..data -> ..v1`."""
    (root / "mount").mkdir()
    for version in ("v1", "v2"):
        write(root / "mount" / f"..{version}", version)
    switch(root / "mount" / "..data", "..v1")
    for name in (CONFIG, WEIGHTS):
        (root / "mount" / name).symlink_to(f"..data/{name}")
    return root / "mount"


def file_link(root: Path) -> Path:
    """`current.safetensors -> v1.safetensors`."""
    switch(root / "current.safetensors", f"v1/{WEIGHTS}")
    return root / "current.safetensors"


def sub_folder_of_link(root: Path) -> Path:
    """`current/inner`, of which only `current` is a link."""
    for version in ("v1", "v2"):
        write(root / version / "inner", version)
    return folder_link(root) / "inner"


def files_in_folder(root: Path) -> Path:
    """A folder whose files are links."""
    (root / "folder").mkdir()
    for name in (CONFIG, WEIGHTS):
        switch(root / "folder" / name, f"../v1/{name}")
    return root / "folder"


WAYS: dict[Callable[[Path], Path], list[tuple[str, str]]] = {
    folder_link: [("current", "v2")],
    kubernetes: [("mount/..data", "..v2")],
    file_link: [("current.safetensors", f"v2/{WEIGHTS}")],
    sub_folder_of_link: [("current", "v2")],
    files_in_folder: [(f"folder/{name}", f"../v2/{name}") for name in (CONFIG, WEIGHTS)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("then", ["use by name", "use by path", "load", "load with its name", "pin", "replace"])
def test_a_switched_link_is_a_new_version(
    manager: AdapterManager, tmp_path: Path, way: Callable[[Path], Path], then: str
) -> None:
    """Whoever asks next gets what the path means now; name and ids stay."""
    for version in ("v1", "v2"):
        write(tmp_path / version, version)
    path = str(way(tmp_path))
    first = manager.load(AdapterSource(path, name="style"), default_scale=0.5).result(5).adapter
    for link, target in WAYS[way]:
        switch(tmp_path / link, target)
    if then == "use by name":
        manager.resolve([AdapterUse(ByName("style"))]).result(5)
    elif then == "use by path":
        manager.resolve([AdapterUse(AdapterSource(path))]).result(5)
    elif then == "pin":
        manager.pin(ByName("style"), PinLevel.HOST).result(5)
        manager.unpin(ByName("style"))
    else:
        name = None if then == "load" else "style"
        manager.load(AdapterSource(path, name=name), replace=then == "replace").result(5)
    second = manager.get(ByName("style"))
    assert second.current_digest != first.current_digest
    assert (second.ids, second.default_scale, second.source) == (first.ids, 0.5, first.source)
    assert len(manager.list()) == 1


def test_two_names_of_a_link_move_each_when_it_is_asked_for(manager: AdapterManager, tmp_path: Path) -> None:
    """And the id of the path stays with the one that has it."""
    for version in ("v1", "v2"):
        write(tmp_path / version, version)
    path = str(folder_link(tmp_path))
    for name in ("zulu", "alpha"):
        manager.load(AdapterSource(path, name=name)).result(5)
    switch(tmp_path / "current", "v2")
    (by_path,) = manager.resolve([AdapterUse(AdapterSource(path))]).result(5)
    assert (by_path.applied.name, by_path.applied.id) == ("zulu", stable_adapter_id(path))
    digests = {manager.resolve([AdapterUse(ByName(name))]).result(5)[0].applied.digest for name in ("zulu", "alpha")}
    assert digests == {by_path.applied.digest}


def test_a_path_that_led_to_an_adapter_of_another_path_is_an_adapter_of_its_own(
    manager: AdapterManager, tmp_path: Path
) -> None:
    """Its id stays where it was; the picture is of what the path means."""
    for version in ("v1", "v2"):
        write(tmp_path / version, version)
    path = str(folder_link(tmp_path))
    first = manager.load(AdapterSource(str(tmp_path / "v1"), name="first")).result(5).adapter
    assert manager.load(AdapterSource(path)).result(5).adapter.name == "first"
    switch(tmp_path / "current", "v2")
    (by_path,) = manager.resolve([AdapterUse(AdapterSource(path))]).result(5)
    assert by_path.applied.digest != first.current_digest
    assert manager.resolve([AdapterUse(ByName("first"))]).result(5)[0].applied.digest == first.current_digest


def test_load_with_replace_reads_what_seems_unchanged(manager: AdapterManager, tmp_path: Path) -> None:
    """Whatever the file system's times say."""
    write(tmp_path / "a", "one")
    loader = manager._reads._loader
    first = manager.load(AdapterSource(str(tmp_path / "a"))).result(5).adapter
    loader.signature = lambda _: first_signature  # type: ignore[method-assign]
    first_signature = manager._registry.get("a").signature  # type: ignore[union-attr]
    write(tmp_path / "a", "two")
    assert manager.load(AdapterSource(str(tmp_path / "a"))).result(5).adapter.current_digest == first.current_digest
    second = manager.load(AdapterSource(str(tmp_path / "a")), replace=True).result(5).adapter
    assert second.current_digest != first.current_digest


def test_a_name_of_another_source_still_needs_replace(manager: AdapterManager, tmp_path: Path) -> None:
    """A switched link is the same source; another path is not."""
    for version in ("v1", "v2"):
        write(tmp_path / version, version)
    manager.load(AdapterSource(str(tmp_path / "v1"), name="style")).result(5)
    with pytest.raises(AdapterAlreadyExistsError):
        manager.load(AdapterSource(str(tmp_path / "v2"), name="style")).result(5)
    manager.load(AdapterSource(str(tmp_path / "v2"), name="style"), replace=True).result(5)


def test_a_fault_that_stays_is_told(manager: AdapterManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written folder is served as it was; when nobody has written for a while, its fault is the request's."""
    write(tmp_path / "a", "one")
    digest = manager.load(AdapterSource(str(tmp_path / "a"))).result(5).adapter.current_digest
    write(tmp_path / "a", "bad")
    assert manager.resolve([AdapterUse(ByName("a"))]).result(5)[0].applied.digest == digest
    monkeypatch.setattr("lora_server.adapters.settling.WRITING_S", 0.0)
    with pytest.raises(AdapterMalformedError):
        manager.resolve([AdapterUse(ByName("a"))]).result(5)
    with pytest.raises(AdapterError):
        manager.load(AdapterSource(str(tmp_path / "a"))).result(5)

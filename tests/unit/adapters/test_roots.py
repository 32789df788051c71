"""What a path means, which links are followed, and that nobody is led out of the roots between check and opening."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lora_server.adapters import roots as roots_module
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import AdapterError, AdapterMalformedError, AdapterSourceForbiddenError

NAME = "style.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one folder of an adapter, and a secret of the same form beside the root."""
    for folder, data in (("root/a", b"weights"), ("secret", b"secret")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(data)
        (tmp_path / folder / "README.md").write_bytes(data)
    return tmp_path / "root"


def snapshot(folder: Path) -> Path:
    """A repository as the hub's cache has it; returns the snapshot's folder."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "0f1e2d").write_bytes(b"weights")
    place = folder / "snapshots" / "abc"
    place.mkdir(parents=True)
    (place / NAME).symlink_to("../../blobs/0f1e2d")
    return place


@pytest.mark.parametrize("base", ["", "snapshots/abc", f"snapshots/abc/{NAME}"])
def test_a_link_to_a_blob_is_a_weights_file_by_whatever_root(tmp_path: Path, base: str) -> None:
    """The repository, its snapshot or the file itself may be what is allowed; the link's name is what counts."""
    place = snapshot(tmp_path / "models--acme--style")
    roots = AdapterRoots([tmp_path / "models--acme--style" / base])
    found = roots.locate(str(place / NAME))
    assert found == place.resolve() / NAME
    assert AdapterFolder(found, [], roots).read(100).contents == {NAME: b"weights"}
    if base != f"snapshots/abc/{NAME}":
        assert AdapterFolder(roots.locate(str(place)), [], roots).read(100).contents == {NAME: b"weights"}


def test_the_blobs_of_a_snapshot_are_no_way_out(tmp_path: Path) -> None:
    """Neither a path into them, nor a link of theirs, nor another repository's blobs."""
    place = snapshot(tmp_path / "models--acme--style")
    other = snapshot(tmp_path / "models--acme--other")
    roots = AdapterRoots([place])
    (place / "other.safetensors").symlink_to(other.parent.parent / "blobs" / "0f1e2d")
    with pytest.raises(AdapterSourceForbiddenError):
        roots.locate(str(place / "other.safetensors"))
    with pytest.raises(AdapterError):
        roots.locate(str(tmp_path / "models--acme--style" / "blobs" / "0f1e2d"))


def test_a_link_of_another_name_is_what_it_leads_to(root: Path) -> None:
    """And a pickle stays one."""
    (root / "b.bin").write_bytes(b"x")
    (root / "link.bin").symlink_to("b.bin")
    with pytest.raises(AdapterMalformedError, match="pickle"):
        AdapterRoots([root]).locate(str(root / "link.bin"))
    (root / "again").symlink_to("a")
    assert AdapterRoots([root]).locate("again") == root.resolve() / "a"


def test_a_root_that_is_a_link_may_be_switched(tmp_path: Path) -> None:
    """What it leads to now is allowed; relative paths are looked up there."""
    for version in ("v1", "v2"):
        (tmp_path / version / version).mkdir(parents=True)
    (tmp_path / "current").symlink_to("v1")
    roots = AdapterRoots([tmp_path / "current"])
    assert roots.locate("v1").name == "v1"
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").replace(tmp_path / "current")
    assert roots.locate("v2").name == "v2"
    assert roots.locate(str(tmp_path / "current" / "v2")).name == "v2"


FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md", "sub/adapter_model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["file", "folder", "parent"])
def test_a_link_put_in_between_check_and_opening_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    """Weights, configurations, cards, sub-folders: the file, its folder or the folder above may be swapped."""
    (root / "a" / "sub").mkdir()
    (root.parent / "secret" / "sub").mkdir()
    for folder in (root / "a", root.parent / "secret"):
        (folder / "sub" / "adapter_model.safetensors").write_bytes(folder.name.encode())
    roots = AdapterRoots([root])
    folder = AdapterFolder(roots.locate("a"), ["sub"], roots)
    swapped = root / "a" / name
    if what != "file":
        swapped = swapped.parent if what == "folder" else root
    opening = roots_module._open_without_links

    def swap(real: Path) -> int:
        target = root.parent / "secret" / (name if what == "file" else "." if what == "folder" else "")
        if what == "folder" and "/" in name:
            target = root.parent / "secret" / "sub"
        if not swapped.is_symlink() and real.name == Path(name).name and real.parent == (root / "a" / name).parent:
            swapped.rename(swapped.with_name("aside"))
            if what == "parent":
                swapped.mkdir()
                (swapped / "a").symlink_to(root.parent / "secret")
            else:
                swapped.symlink_to(target)
        return opening(real)

    monkeypatch.setattr(roots_module, "_open_without_links", swap)
    data: dict[str, Any] = {}
    try:
        files = folder.read(100)
        data = {**files.contents, **files.cards}
    except AdapterError:
        pass
    assert b"secret" not in {bytes(each) for each in data.values()}


def test_no_descriptor_is_left_open(root: Path) -> None:
    """Whether a file can be opened or not."""
    roots = AdapterRoots([root])
    before = len(os.listdir("/proc/self/fd"))
    os.close(roots.open(root / "a" / "README.md"))
    with pytest.raises(FileNotFoundError):
        roots.open(root / "a" / "nothing")
    (root / "a" / "out").symlink_to(root.parent / "secret" / "README.md")
    with pytest.raises(AdapterSourceForbiddenError):
        roots.open(root / "a" / "out")
    assert len(os.listdir("/proc/self/fd")) == before

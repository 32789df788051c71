"""Where adapters may come from, and what makes two versions the same."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import (
    AdapterFileTooLargeError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter folder, and a secret beside it."""
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "adapter_config.json").write_text("{}")
    return tmp_path / "root"


@pytest.mark.parametrize("path", ["a", "a/", "./a"])
def test_relative_and_absolute_paths_mean_the_same_folder(root: Path, path: str) -> None:
    """A relative path is looked up in the roots."""
    assert AdapterRoots([root]).locate(path) == AdapterRoots([root]).locate(str(root / "a"))


@pytest.mark.parametrize("path", ["/etc", "../secret", "a/../../secret", "link", "a\0b", "", "/nope/at/all"])
def test_nothing_outside_the_roots_is_reachable(root: Path, path: str) -> None:
    """No `..`, no link out, no NUL, no absolute path elsewhere; existing or not makes no difference."""
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(AdapterSourceForbiddenError):
        AdapterRoots([root]).locate(path)


def test_a_missing_folder_is_not_found(root: Path) -> None:
    """Inside the roots a missing path is said to be missing."""
    with pytest.raises(AdapterSourceNotFoundError):
        AdapterRoots([root]).locate("nope")


def test_a_file_link_out_of_the_roots_is_refused(root: Path) -> None:
    """A link in an allowed folder does not lead out either."""
    (root / "a" / "adapter_config.json").unlink()
    (root / "a" / "adapter_config.json").symlink_to(root.parent / "secret" / "adapter_config.json")
    with pytest.raises(AdapterSourceForbiddenError):
        AdapterFolder(root / "a", [], AdapterRoots([root])).read(100)


def test_a_fifo_cannot_hang_the_loader(root: Path) -> None:
    """What is not a regular file is not an adapter's."""
    (root / "a" / "adapter_model.safetensors").unlink()
    os.mkfifo(root / "a" / "adapter_model.safetensors")
    names = AdapterFolder(root / "a", [], AdapterRoots([root])).read(100).contents
    assert list(names) == ["adapter_config.json"]


def test_too_large_a_file_is_refused_before_it_is_read(root: Path) -> None:
    """The limit counts."""
    with pytest.raises(AdapterFileTooLargeError, match="at most 3"):
        AdapterFolder(root / "a", [], AdapterRoots([root])).read(3)


def test_digest_covers_every_file_that_counts(root: Path) -> None:
    """The configuration and component folders change it; other files and times do not."""
    folder = AdapterFolder(root / "a", ["text_encoder"], AdapterRoots([root]))
    first, signature = folder.read(100).digest, folder.signature()
    (root / "a" / "README.md").write_text("hello")
    os.utime(root / "a" / "adapter_config.json", ns=(1, 1))
    assert folder.read(100).digest == first
    assert folder.signature() != signature
    (root / "a" / "text_encoder").mkdir()
    (root / "a" / "text_encoder" / "adapter_config.json").write_text("{}")
    second = folder.read(100).digest
    (root / "a" / "adapter_config.json").write_text("{ }")
    assert len({first, second, folder.read(100).digest}) == 3


def write(path: Path, data: bytes = b"weights") -> None:
    """A file, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


NOT_A_USERS = [
    "._style.safetensors", ".complete-style.safetensors", ".hidden.safetensors", "optimizer.safetensors",
    "optimizer_0.safetensors", "optimizer_state.safetensors", "training_state.safetensors",
    "random_states_0.safetensors",
    "scheduler.safetensors", "style.tmp.safetensors", "style.safetensors.incomplete", "style.safetensors.tmp",
    ".DS_Store", ".git/x.safetensors", ".cache/huggingface/x.safetensors", "model.distcp", "state/x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_A_USERS)
def test_what_is_no_users_weights_is_passed_over(root: Path, name: str) -> None:
    """Beside one file of weights, and alone."""
    write(root / "b" / "my optimizer style (v2).safetensors")
    write(root / "b" / name, b"not weights")
    folder = AdapterFolder(root / "b", [], AdapterRoots([root]))
    assert list(folder.read(100).contents) == ["my optimizer style (v2).safetensors"]
    (root / "b" / "my optimizer style (v2).safetensors").unlink()
    with pytest.raises(AdapterSourceNotFoundError, match="no adapter_config"):
        folder.read(100)


NAMES = [
    "My Style (v2) [final]", "水彩", "a&b #1", "100%", "what?", "a+b", "a:b", "-dash", "🎨 paint", "e\u0301te\u0301",
    "\xe9t\xe9",    "it's \"quoted\"", "a@b", "a,b=1", "a..b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_have_any_name(root: Path, name: str) -> None:
    """By its folder and by itself."""
    write(root / "b" / f"{name}.safetensors")
    roots = AdapterRoots([root])
    assert list(AdapterFolder(roots.locate("b"), [], roots).read(100).contents) == [f"{name}.safetensors"]
    bare = roots.locate(str(root / "b" / f"{name}.safetensors"))
    assert AdapterFolder(bare, [], roots).read(100).contents == {f"{name}.safetensors": b"weights"}


def test_a_name_that_is_not_utf8_has_a_digest_too(root: Path) -> None:
    """It is what it is on the disk."""
    write(root / "b" / os.fsdecode(b"st\xffyle.safetensors"))
    assert AdapterFolder(root / "b", [], AdapterRoots([root])).read(100).digest.startswith("sha256:")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "text_encoder/adapter_config.json"]
)
def test_an_overwrite_that_keeps_size_and_time_is_noticed(root: Path, name: str) -> None:
    """Nobody can set a ctime; the inode is the same, too."""
    write(root / "a" / name, b"{  }")
    folder = AdapterFolder(root / "a", ["text_encoder"], AdapterRoots([root]))
    path, before = root / "a" / name, folder.signature()
    times = path.stat()
    time.sleep(0.02)
    with open(path, "r+b") as file:
        file.write(b"[  ]")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert folder.signature() != before


@pytest.mark.parametrize("missing", ["", "adapter_model.safetensors"])
def test_what_vanishes_is_an_error_of_the_house_at_every_look(root: Path, missing: str) -> None:
    """Cards, signature, files: a folder that goes while it is looked at, or a file of it."""
    folder = AdapterFolder(root / "a", [], AdapterRoots([root]))
    (root / "a" / "adapter_config.json").unlink()
    (root / "a" / "adapter_model.safetensors").unlink()
    if not missing:
        (root / "a").rmdir()
    for look in (folder.signature, folder.contents, folder.paths, folder.card_names, folder.cards):
        try:
            look(100) if look == folder.contents else look()  # type: ignore[call-arg]
        except AdapterSourceNotFoundError:
            continue
        assert missing
        assert look in (folder.card_names, folder.cards)

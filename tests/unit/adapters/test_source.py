"""Where adapters may come from, and what makes two versions the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lora_server.adapters.source import AdapterFolder, AdapterRoots
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

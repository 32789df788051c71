"""Files that are read again: only when they changed, and never for the worse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lora_server.security.watched import Watched


class Clock:
    """Time that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def parse_number(path: Path) -> int:
    """A file's content as a number."""
    return int(path.read_text())


def test_changes_are_taken_and_bad_ones_are_not(tmp_path: Path) -> None:
    """By writing, by renaming, through a link; what cannot be read leaves the last good value."""
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("1")
    link.symlink_to(path)
    reads: list[int] = []

    def parse() -> int:
        reads.append(parse_number(link))
        return reads[-1]

    watched = Watched("numbers", [link], parse, Clock())
    assert [watched.get(), watched.get()] == [1, 1]
    assert len(reads) == 1
    path.write_text("22")
    assert watched.get() == 22
    path.write_text("not a number")
    assert [watched.get(), watched.get()] == [22, 22]
    path.unlink()
    assert [watched.get(), watched.get()] == [22, 22]
    other = tmp_path / "b"
    other.write_text("3")
    os.replace(other, path)
    assert watched.get() == 3
    second = tmp_path / "c"
    second.write_text("4")
    (tmp_path / "new").symlink_to(second)
    os.replace(tmp_path / "new", link)
    assert watched.get() == 4


def test_the_first_reading_must_succeed(tmp_path: Path) -> None:
    """A server does not start with what it cannot read."""
    with pytest.raises(FileNotFoundError):
        Watched("numbers", [tmp_path / "none"], lambda: 1)

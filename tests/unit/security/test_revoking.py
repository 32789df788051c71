"""A token file that is changed while the server runs: what revokes, and what does not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_server.errors import UnauthenticatedError
from lora_server.security import watched as watching
from lora_server.security.caller import Caller, current_caller, renew_caller, set_caller
from lora_server.security.tokens import TokenTable, new_token, watched_tokens
from lora_server.security.watched import Watched

TOKEN, LINE = new_token(["generate"], "acme")
OTHER_TOKEN, OTHER_LINE = new_token(["generate"], "umbrella")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token file of one token, which is looked at whenever it is asked for."""
    monkeypatch.setattr(watching, "_CHECK_INTERVAL_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(LINE)
    return path


def knows(table: Watched[TokenTable], token: str = TOKEN) -> bool:
    """Whether a token is valid now."""
    return table.get().find(token) is not None


def unreadable(path: Path) -> None:
    """Takes the rights away; root, who may read everything, gets a folder in the file's place."""
    if os.getuid():
        path.chmod(0)
    else:
        path.unlink()
        path.mkdir()


REVOKING: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_text(""),
    "only comments": lambda path: path.write_text("# nobody\n\n"),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "unreadable": unreadable,
}


@pytest.mark.parametrize("how", REVOKING)
def test_a_file_that_is_gone_or_empty_revokes_every_token(file: Path, how: str) -> None:
    """At the next look, for good, until the file is back."""
    table = watched_tokens(file)
    assert knows(table)
    REVOKING[how](file)
    assert [knows(table), knows(table)] == [False, False]
    aside = file.with_name("aside")
    aside.write_text(LINE)
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    os.replace(aside, file)
    assert knows(table)


@pytest.mark.parametrize("text", ["garbage", f"{LINE[:40]}", f"{OTHER_LINE}\ngarbage", "\0" * 80, "\udcff\udcfe"])
def test_what_cannot_be_understood_revokes_nobody_and_lets_nobody_in(file: Path, text: str) -> None:
    """A typing error, or half a file, stops no service."""
    table = watched_tokens(file)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [knows(table), knows(table, OTHER_TOKEN)] == [True, False]
    file.write_text(OTHER_LINE)
    assert [knows(table), knows(table, OTHER_TOKEN)] == [False, True]


def test_an_overwrite_of_the_same_size_and_time_is_noticed(file: Path) -> None:
    """Whoever writes can set the time of the content back, but not that of the inode's change."""
    before = file.stat()
    other_line = OTHER_LINE.replace("umbrella", "evil")  # as long as acme's
    assert len(other_line) == len(LINE)
    table = watched_tokens(file)
    with file.open("r+") as opened:
        opened.write(other_line)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [knows(table), knows(table, OTHER_TOKEN)] == [False, True]


def test_a_switched_folder_is_noticed(tmp_path: Path, file: Path) -> None:
    """As Kubernetes mounts secrets: the file is a link through `..data`, which is switched as a whole."""
    for version, line in (("v1", LINE), ("v2", OTHER_LINE)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tokens").write_text(line)
    (tmp_path / "..data").symlink_to("v1")
    file.unlink()
    file.symlink_to("..data/tokens")
    table = watched_tokens(file)
    (tmp_path / "..new").symlink_to("v2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert [knows(table), knows(table, OTHER_TOKEN)] == [False, True]
    (tmp_path / "..data").unlink()
    assert not knows(table, OTHER_TOKEN)


def test_a_server_out_of_descriptors_keeps_its_tokens(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no fault of the file revokes nobody, and is tried again."""
    table = watched_tokens(file)
    file.write_text(OTHER_LINE)

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", fail)
        assert knows(table)
    assert [knows(table), knows(table, OTHER_TOKEN)] == [False, True]


def test_a_call_that_lasts_can_ask_again_who_makes_it() -> None:
    """For streams without an end; whoever is let in no more is told so."""
    callers = [Caller("acme", frozenset(["admin"])), Caller("acme", frozenset(["generate"]))]

    def again() -> Caller:
        if not callers:
            raise UnauthenticatedError
        return callers.pop(0)

    set_caller(again(), again)
    assert renew_caller() == current_caller() == Caller("acme", frozenset(["generate"]))
    with pytest.raises(UnauthenticatedError):
        renew_caller()

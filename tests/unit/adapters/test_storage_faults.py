"""Disks that are full, read-only or broken, and states that are new, damaged or of a later release: nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import UPLOAD_SCHEME
from lora_server.adapters.state import StateDamagedError, StateFile
from lora_server.adapters.store import ContentStore, FileEntry
from lora_server.config import CacheConfig
from lora_server.errors import DiskFullError, LoraServerError, StateNotSavedError, StorageFailedError
from lora_server.types import AdapterSource, ByName, PinLevel

from tests.stateful.file_loader import FileLoader

DATA = b"weights"
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


class House:
    """A manager over a state directory, as the server builds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ContentStore(folder)
        self.file = StateFile(folder / "state.sqlite3")
        roots = AdapterRoots([folder.parent, self.store.root], {UPLOAD_SCHEME: self.store.place})
        config = CacheConfig(budget_bytes=1000, device_slots=9)
        self.manager = AdapterManager(config, FileLoader(roots), store=self.store, state=self.file)
        self.manager.restore()

    def push(self, name: str = "a") -> None:
        """Uploads a bare adapter; acknowledged when it returns."""
        with self.store.begin(name, [FileEntry("x.safetensors", len(DATA), DIGEST[7:])], bare=True) as incoming:
            incoming.write(0, 0, DATA)
            incoming.commit()
        try:
            self.manager.load(AdapterSource(UPLOAD_SCHEME + DIGEST, name=name)).result(5)
        finally:
            self.manager.release_upload(DIGEST)
        self.manager.saved().result(5)

    def close(self) -> None:
        """As the server ends."""
        self.manager.check_integrity()
        self.manager.close()
        self.file.close()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[House]:
    """A house, closed afterwards."""
    house = House(folder)
    try:
        yield house
    finally:
        house.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state directory with one upload that is registered."""
    with opened(tmp_path / "state") as house:
        house.push()
    return tmp_path / "state"


def kept(folder: Path) -> list[bytes]:
    """What lies in the quarantine."""
    return [path.read_bytes() for path in (folder / "quarantine").rglob("*.safetensors")]


@pytest.mark.parametrize("left", [(), ("-wal", "-shm")])
def test_uploads_that_a_new_state_does_not_name_are_moved_aside(folder: Path, left: tuple[str, ...]) -> None:
    """Said in the log, and never deleted, whatever else is uploaded, unloaded and restarted."""
    for path in folder.glob("state.sqlite3*"):
        path.unlink()
    for end in left:
        (folder / f"state.sqlite3{end}").write_bytes(b"of another file")
    for _ in range(2):
        with opened(folder) as house:
            assert not house.manager.list()
            assert not house.store.digests()
            house.push("b")
            house.manager.unload(ByName("b"))
            house.manager.saved().result(5)
            assert kept(folder) == [DATA]


def test_a_start_that_is_killed_while_it_moves_them_goes_on_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is new until all is safe."""
    (folder / "state.sqlite3").unlink()
    monkeypatch.setattr(ContentStore, "quarantine", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        House(folder)
    monkeypatch.undo()
    with opened(folder):
        assert kept(folder) == [DATA]


def damage(path: Path) -> None:
    """Writes over the file."""
    path.write_bytes(b"something else" * 1000)


def later(path: Path) -> None:
    """Makes it one of a later release."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")


def bad_document(path: Path) -> None:
    """One document says nothing that is known."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE adapters SET document = '{}'")


@pytest.mark.parametrize("spoil", [damage, later, bad_document])
def test_a_state_that_cannot_be_read_costs_no_upload(folder: Path, spoil: Callable[[Path], None]) -> None:
    """The start is refused, again and again; moved away as the error says, the uploads are kept aside."""
    spoil(folder / "state.sqlite3")
    before = (folder / "state.sqlite3").read_bytes()
    for _ in range(2):
        with pytest.raises(StateDamagedError):
            House(folder)
        assert [path.read_bytes() for path in (folder / "store").rglob("*.safetensors")] == [DATA]
    assert spoil is not damage or (folder / "state.sqlite3").read_bytes() == before
    (folder / "state.sqlite3").rename(folder / "old")
    with opened(folder):
        assert kept(folder) == [DATA]


def failing(code: int) -> Callable[..., Any]:
    """A call of the system that fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


STEPS = {
    "fsync": ("os.fsync",),
    "rename": ("os.rename",),
    "mkdir": ("pathlib.Path.mkdir",),
    "open": ("lora_server.adapters.incoming.Incoming._open",),
    "free space": ("lora_server.adapters.store.shutil.disk_usage",),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, StorageFailedError),
     (errno.EROFS, StorageFailedError), (errno.EACCES, StorageFailedError)],
)  # fmt: skip
def test_a_write_of_the_store_that_fails_is_a_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, expected: type[LoraServerError]
) -> None:
    """Whatever step fails; afterwards, the same upload passes."""
    with opened(tmp_path / "state") as house:
        for target in STEPS[step]:
            monkeypatch.setattr(target, failing(code))
        with pytest.raises(expected):
            house.push()
        monkeypatch.undo()
        assert not house.store._held
        assert not house.store._arriving
        house.push()
        assert house.store.digests() == {DIGEST}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_pin_that_cannot_be_copied_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The adapter is served on, unpinned."""
    (tmp_path / "a.safetensors").write_bytes(DATA)
    with opened(tmp_path / "state") as house:
        house.manager.load(AdapterSource(str(tmp_path / "a.safetensors"), name="a")).result(5)
        house.manager.saved().result(5)
        monkeypatch.setattr("lora_server.adapters.incoming.Incoming._open", failing(code))
        with pytest.raises((DiskFullError, StorageFailedError)):
            house.manager.pin(ByName("a"), PinLevel.HOST).result(5)
        monkeypatch.undo()
        assert house.manager.get(ByName("a")).pin is None


def test_a_removal_that_fails_fails_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be swept stays until the next time."""
    with opened(folder) as house:
        monkeypatch.setattr("os.rename", failing(errno.EROFS))
        house.manager.unload(ByName("a"))
        house.manager.saved().result(5)
        house.manager.release_upload(DIGEST)
        assert house.store.digests() == {DIGEST}
        monkeypatch.undo()
        house.manager.release_upload(DIGEST)
        assert not house.store.digests()


ERRORS = [
    OSError(errno.ENOSPC, "full"), sqlite3.OperationalError("database or disk is full"), ValueError("bad value"),
    MemoryError(), RuntimeError("anything"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_journal_survives_whatever_a_write_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whoever changed something hears of it; it is counted, tried again by itself, and written in the end."""
    monkeypatch.setattr("lora_server.adapters.journal._RETRY_S", 0.05)
    with opened(tmp_path / "state") as house:
        writing = house.file.write

        def fail(_: Any) -> None:
            raise error

        monkeypatch.setattr(house.file, "write", fail)
        with pytest.raises(StateNotSavedError):
            house.push()
        assert house.manager.cache_info().unsaved_adapters == 1
        monkeypatch.setattr(house.file, "write", writing)
        until(lambda: house.manager.cache_info().unsaved_adapters == 0)
        house.manager.saved().result(5)
        assert list(house.file.read()) == ["a"]


def test_one_adapter_that_cannot_be_written_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its change is refused by name; those of others are saved."""
    from lora_server.adapters import keeper

    document_of = keeper.document_of

    def document(record: Any) -> Any:
        if record.name == "bad":
            raise TypeError("no document")
        return document_of(record)

    monkeypatch.setattr(keeper, "document_of", document)
    with opened(tmp_path / "state") as house:
        with pytest.raises(StateNotSavedError, match="'bad'"):
            house.push("bad")
        house.push("good")
        assert list(house.file.read()) == ["good"]
        assert house.manager.cache_info().unsaved_adapters == 1
        house.manager.unload(ByName("bad"))
        house.manager.saved().result(5)
        assert house.manager.cache_info().unsaved_adapters == 0


def test_the_journal_survives_what_is_done_after_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that raises anything is logged; the change is saved."""
    with opened(tmp_path / "state") as house:
        monkeypatch.setattr(house.store, "sweep", lambda _: (_ for _ in ()).throw(RuntimeError("anything")))
        with contextlib.suppress(RuntimeError):
            house.push()
        house.manager.saved().result(5)
        monkeypatch.undo()
        assert list(house.file.read()) == ["a"]
        assert any(thread.name == "journal" for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread will do."""
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.01)

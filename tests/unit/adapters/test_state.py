"""What survives a restart: names, versions, pins and uploads, and the server's own copies of what is pinned."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import UPLOAD_SCHEME, AdapterFiles
from lora_server.adapters.state import PinLostError, StateDamagedError, StateFile
from lora_server.adapters.store import ContentStore, FileEntry
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterNotFoundError,
    AdapterPinnedError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
    StateNotSavedError,
)
from lora_server.types import AdapterInfo, AdapterSource, AdapterState, AdapterUse, ByName, PinLevel, Viewer

from tests.stateful.file_loader import FileLoader

NOW = [1000.0]


class House:
    """A manager over a root of adapters and a state directory, which can be left as a crash leaves it."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root, self.state = root / "adapters", root / "state"
        for folder in (self.root, self.state):
            folder.mkdir(exist_ok=True)
        self.store = ContentStore(self.state)
        self.file = StateFile(self.state / "state.sqlite3")
        roots = AdapterRoots([self.root, self.store.root], {UPLOAD_SCHEME: self.store.place})
        self.manager = AdapterManager(
            CacheConfig(**{"budget_bytes": 1000, "device_slots": 9, **config}),
            FileLoader(roots),
            clock=lambda: NOW[0],
            store=self.store,
            state=self.file,
        )

    def write(self, name: str, data: bytes) -> str:
        """Writes a bare adapter; returns its path."""
        path = self.root / f"{name}.safetensors"
        path.write_bytes(data)
        return str(path)

    def load(self, name: str, data: bytes | None = None, **options: Any) -> AdapterInfo:
        """Loads a bare adapter, written before unless *data* is None; acknowledged when it returns."""
        path = str(self.root / f"{name}.safetensors") if data is None else self.write(name, data)
        return self.acknowledged(self.manager.load(AdapterSource(path, name=name), **options)).adapter

    def load_path(self, path: str) -> AdapterInfo:
        """Loads what a path means."""
        return self.acknowledged(self.manager.load(AdapterSource(path))).adapter

    def push(self, name: str, data: bytes, **options: Any) -> AdapterInfo:
        """Uploads a bare adapter as the handler does."""
        entry = FileEntry("x.safetensors", len(data), hashlib.sha256(data).hexdigest())
        with self.store.begin(name, [entry], bare=True) as incoming:
            incoming.write(0, 0, data)
            digest = incoming.commit()
        loading = self.manager.load(AdapterSource(UPLOAD_SCHEME + digest, id=7, name=name), **options)
        loading.add_done_callback(lambda _: self.manager.release_upload(digest))
        return self.acknowledged(loading).adapter

    def pin(self, name: str, level: PinLevel = PinLevel.HOST, ttl_s: float | None = None) -> AdapterInfo:
        """Pins."""
        return self.acknowledged(self.manager.pin(ByName(name), level, ttl_s))

    def acknowledged(self, future: Future[Any]) -> Any:
        """The result, when it survives a crash."""
        result = future.result(5)
        self.manager.saved().result(5)
        return result

    def get(self, name: str) -> AdapterInfo:
        """What is registered."""
        return self.manager.get(ByName(name))

    def stored(self) -> int:
        """How many things are in the store."""
        return len(self.store.digests())


Open = Callable[..., House]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Open]:
    """Opens the house, again and again: what ran before is closed without another word to the state file."""
    houses: list[House] = []

    def begin(*, strict: bool = False, **config: Any) -> House:
        if houses:
            close(houses[-1])
        houses.append(House(tmp_path, **config))
        houses[-1].manager.restore(strict=strict)
        return houses[-1]

    def close(last: House) -> None:
        last.manager.check_integrity()
        last.manager.close()
        last.file.close()

    yield begin
    close(houses[-1])


def test_names_scales_and_reports_come_back(house: Open) -> None:
    """Registered, not cached: the first use reads them, and ids and report are known at once."""
    first = house()
    before = first.load("a", b"aaa", default_scale=0.5)
    after = house().get("a")
    assert (after.name, after.ids, after.source, after.default_scale) == ("a", before.ids, before.source, 0.5)
    assert after.current_digest == before.current_digest
    assert after.versions[0].report == before.versions[0].report
    assert after.versions[0].state is AdapterState.REGISTERED


def test_what_was_unloaded_stays_unloaded(house: Open) -> None:
    """An upload's file goes when that is certain, and not before."""
    first = house()
    first.load("a", b"aaa")
    first.push("b", b"bbb")
    assert first.stored() == 1
    first.manager.unload(ByName("a"))
    first.manager.unload(ByName("b"))
    first.manager.saved().result(5)
    assert first.stored() == 0
    assert not house().manager.list()


def test_uploads_and_their_versions_come_back(house: Open) -> None:
    """The last one pushed is served from the store; its predecessor's file is gone."""
    first = house()
    old = first.push("b", b"old")
    new = first.push("b", b"new")
    assert (old.ids, first.stored()) == (new.ids, 1)
    again = house()
    assert again.get("b").current_digest == new.current_digest
    (resolved,) = again.manager.resolve([AdapterUse(ByName("b"))]).result(5)
    assert resolved.applied.digest == new.current_digest
    assert again.load("a", b"aaa").name == "a"


def test_the_state_directory_may_be_moved(house: Open, tmp_path: Path) -> None:
    """Uploads are found again by their digests, wherever the store lies now."""
    digest = house().push("b", b"bbb").current_digest
    again = house()
    again.manager.close()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "state", moved / "state")
    shutil.rmtree(tmp_path / "state")
    other = House(moved)
    other.manager.restore()
    (resolved,) = other.manager.resolve([AdapterUse(ByName("b"))]).result(5)
    assert resolved.applied.digest == digest
    other.manager.close()
    other.file.close()


def test_a_pin_survives_with_the_bytes_of_a_vanished_source(house: Open) -> None:
    """Pinned at once and after a restart, though the file is gone; unpinned, the copy goes."""
    first = house()
    digest = first.load("a", b"aaa").current_digest
    first.pin("a", PinLevel.DEVICE)
    assert first.stored() == 1
    (first.root / "a.safetensors").unlink()
    assert first.manager.resolve([AdapterUse(ByName("a"))]).result(5)[0].applied.digest == digest
    again = house()
    info = again.get("a")
    assert (info.current_digest, info.versions[0].state) == (digest, AdapterState.CACHED)
    assert info.pin is not None
    assert info.pin.level is PinLevel.DEVICE
    brought: list[str] = []
    again.manager.watch_device_pins(lambda adapter: brought.append(adapter.applied.name))
    assert brought == ["a"]
    with pytest.raises(AdapterPinnedError):
        again.manager.unload(ByName("a"))
    again.manager.unpin(ByName("a"))
    again.manager.saved().result(5)
    assert again.stored() == 0
    with pytest.raises(AdapterSourceNotFoundError):
        again.manager.resolve([AdapterUse(ByName("a"))]).result(5)


def test_a_pin_that_was_saved_before_its_copy_is_copied_at_the_next_start(house: Open) -> None:
    """As a process leaves it that is killed while a new version of what is pinned is loaded."""
    first = house()
    first.load("a", b"one")
    first.pin("a")
    with first.manager._lock:
        record = first.manager._registry.get("a")
        assert record is not None
        record.stored = None
        first.manager._books.on_change("a")
    first.manager.saved().result(5)
    second = house(strict=True)
    (second.root / "a.safetensors").unlink()
    third = house(strict=True)
    assert third.get("a").versions[0].state is AdapterState.CACHED


def test_a_new_version_of_what_is_pinned_is_copied_too(house: Open) -> None:
    """The copy is of what is current, and the old one goes."""
    first = house()
    first.load("a", b"aaa")
    first.pin("a")
    digest = first.load("a", b"AAAA").current_digest
    assert first.stored() == 1
    (first.root / "a.safetensors").unlink()
    assert house().get("a").current_digest == digest


def test_a_source_that_changed_while_nobody_looked_is_noticed(house: Open) -> None:
    """Pinned is what was acknowledged; the next use sees the change."""
    first = house()
    old = first.load("a", b"aaa").current_digest
    first.pin("a")
    path = first.write("a", b"changed")
    again = house()
    assert again.get("a").current_digest == old
    (resolved,) = again.manager.resolve([AdapterUse(ByName("a"))]).result(5)
    assert resolved.applied.digest == f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def test_a_pin_that_cannot_be_satisfied_is_listed_and_tried_again(house: Open) -> None:
    """FAILED with its reason, and still a pin, which a start with more room restores; a strict one refuses without."""
    first = house()
    first.load("a", b"a" * 100)
    first.pin("a")
    small = house(budget_bytes=50)
    info = small.get("a")
    assert info.pin is not None
    assert info.versions[0].state is AdapterState.FAILED
    assert "100" in info.versions[0].failure
    with pytest.raises(AdapterPinnedError):
        small.manager.unload(ByName("a"))
    with pytest.raises(PinLostError, match="the pin of adapter"):
        house(strict=True, budget_bytes=50)
    again = house()
    assert again.get("a").versions[0].state is AdapterState.CACHED


def test_a_lost_pin_can_be_ended(house: Open) -> None:
    """Whose source and copy are both gone, it is unpinned and unloaded like any other."""
    first = house()
    first.load("a", b"a" * 100)
    first.pin("a")
    small = house(budget_bytes=50)
    assert small.manager.unpin(ByName("a")).pin is None
    small.manager.unload(ByName("a"))
    small.manager.saved().result(5)
    assert not house().manager.list()


def test_a_pin_that_ended_meanwhile_is_no_pin(house: Open) -> None:
    """Time goes on while nobody runs; what is left of a pin's time is kept."""
    first = house()
    first.load("a", b"aaa")
    first.pin("a", ttl_s=100)
    NOW[0] += 50
    assert house().get("a").pin is not None
    NOW[0] += 60
    assert house().get("a").pin is None


def test_what_cannot_be_saved_is_not_acknowledged(house: Open) -> None:
    """A disk that refuses is an error of the call, which says so; later, all is written after all."""
    first = house()
    first.load("a", b"aaa")
    blocker = sqlite3.connect(first.state / "state.sqlite3", isolation_level=None)
    first.file._db.execute("PRAGMA busy_timeout=0")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateNotSavedError, match="not saved"):
        first.load("b", b"bbb")
    blocker.execute("ROLLBACK")
    blocker.close()
    first.load("c", b"ccc")
    assert [adapter.name for adapter in house().manager.list()] == ["a", "b", "c"]


def test_a_state_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """It is neither overwritten nor believed, and so is one of a later release."""
    (tmp_path / "state.sqlite3").write_bytes(b"something else" * 100)
    with pytest.raises(StateDamagedError, match="move it away"):
        StateFile(tmp_path / "state.sqlite3")
    file = StateFile(tmp_path / "later.sqlite3")
    file.write({"a": {"folder": 1}})
    file.close()
    later = sqlite3.connect(tmp_path / "later.sqlite3")
    later.execute("PRAGMA user_version=99")
    later.close()
    with pytest.raises(StateDamagedError, match="later release"):
        StateFile(tmp_path / "later.sqlite3")


def test_a_document_that_is_none_is_refused_by_name(house: Open, tmp_path: Path) -> None:
    """The error names the adapter whose state is broken."""
    first = house()
    first.load("a", b"aaa")
    first.manager.close()
    broken = sqlite3.connect(tmp_path / "state" / "state.sqlite3")
    broken.execute("UPDATE adapters SET document = '{}'")
    broken.commit()
    broken.close()
    with pytest.raises(StateDamagedError, match="'a'"):
        house()


def test_a_pinned_source_that_a_request_finds_changed_is_copied_anew(house: Open) -> None:
    """The copy follows the version without anybody asking, and the old one is swept."""
    first = house()
    first.load("a", b"aaa")
    first.pin("a")
    first.write("a", b"AAAA")
    (resolved,) = first.manager.resolve([AdapterUse(ByName("a"))]).result(5)
    wait_until(lambda: first.store.digests() == {resolved.applied.digest})
    (first.root / "a.safetensors").unlink()
    assert house().get("a").current_digest == resolved.applied.digest


def test_a_copy_of_an_older_version_is_the_last_resort(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the copy followed, the server restores the version that was current, from its source."""
    first = house()
    first.load("a", b"aaa")
    first.pin("a")
    monkeypatch.setattr(first.manager._books, "on_stale_copy", lambda _: None)
    first.write("a", b"AAAA")
    (resolved,) = first.manager.resolve([AdapterUse(ByName("a"))]).result(5)
    first.manager.saved().result(5)
    again = house()
    assert again.get("a").current_digest == resolved.applied.digest
    wait_until(lambda: again.store.digests() == {resolved.applied.digest})


def test_a_new_version_and_its_scale_are_one_change(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """No moment has one without the other, so that none can be found after a crash."""
    first = house()
    documents: set[tuple[str, float]] = set()
    write = first.file.write

    def written(changes: Any) -> None:
        documents.update((d["version"]["digest"], d["default_scale"]) for d in changes.values())
        write(changes)

    monkeypatch.setattr(first.file, "write", written)
    pushed = {(first.push("b", b"%d" % n, default_scale=float(n)).current_digest, float(n)) for n in range(1, 30)}
    assert documents == pushed


def test_a_tenant_gets_nothing_of_the_store_that_is_not_registered(house: Open) -> None:
    """Neither an upload that was replaced and is there still, nor the copy of a pin, by whatever path."""
    first = house()
    acme, other = frozenset({"acme"}), "umbrella"
    old = first.push("b", b"old", tenants=acme)
    first.store.hold(old.current_digest)  # as a restore or a pin under way would
    new = first.push("b", b"new")
    first.load("a", b"aaa", tenants=acme)
    first.pin("a")
    copy = next(iter(first.store.digests() - {old.current_digest, new.current_digest}))
    for digest in (old.current_digest, new.current_digest, copy):
        place = first.store.place(digest)
        for path in (UPLOAD_SCHEME + digest, str(place), str(place.parent)):
            with pytest.raises((AdapterNotFoundError, AdapterSourceNotFoundError, AdapterSourceForbiddenError)):
                first.manager.resolve([AdapterUse(AdapterSource(path, name="mine"))], other).result(5)
    assert [info.name for info in first.manager.list()] == ["a", "b"]
    own = AdapterUse(AdapterSource(UPLOAD_SCHEME + new.current_digest))
    assert first.manager.resolve([own], "acme").result(5)[0].applied.name == "b"
    with pytest.raises(AdapterSourceForbiddenError):  # it would be swept under the operator's feet
        first.load_path(str(first.store.place(new.current_digest)))


@pytest.mark.parametrize("way", ["load", "push"])
def test_a_binding_to_tenants_survives(house: Open, way: str) -> None:
    """After a restart the others still do not find it, its tenant does; a binding that was ended stays ended."""
    first = house()
    getattr(first, way)("a", b"aaa", tenants=frozenset({"acme", "zeta"}))
    again = house()
    assert again.get("a").tenants == {"acme", "zeta"}
    with pytest.raises(AdapterNotFoundError):
        again.manager.resolve([AdapterUse(ByName("a"))], "umbrella").result(5)
    assert again.manager.resolve([AdapterUse(ByName("a"))], "acme").result(5)[0].applied.name == "a"
    getattr(again, way)("a", b"AAA", tenants=frozenset(), replace=True)
    assert house().get("a").tenants is None


def test_an_upload_is_on_the_disk_before_its_name_is_and_both_before_it_is_acknowledged(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state file never names what a crash could still take away."""
    first = house()
    done: list[str] = []

    def record(owner: Any, function: str) -> None:
        work = getattr(owner, function)

        def recorded(*arguments: Any) -> Any:
            result = work(*arguments)
            done.append(function)
            return result

        monkeypatch.setattr(owner, function, recorded)

    record(os, "fsync")
    record(os, "rename")
    record(first.file, "write")
    first.push("b", b"bbb")
    assert done == ["fsync", "fsync", "rename", "fsync", "write"]  # of the file, its folder and the store


def test_a_commit_of_the_state_file_is_on_the_disk(tmp_path: Path) -> None:
    """WAL, and synchronous=FULL: anything less, and a commit may be lost with the machine."""
    file = StateFile(tmp_path / "state.sqlite3")
    assert file._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert file._db.execute("PRAGMA synchronous").fetchone() == (2,)
    file.close()


def test_a_state_file_that_could_not_be_written_can_be_again(tmp_path: Path) -> None:
    """However often a full disk, on which nothing can be opened either, is tried: each says so, and the next helps."""
    state = StateFile(tmp_path / "state.sqlite3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match="cannot be written"):
                state.write({"neon": {"scale": 1}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state.write({"neon": {"scale": 1}})
    assert state.read() == {"neon": {"scale": 1}}
    state.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what other threads do."""
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.01)


def test_what_requests_have_named_is_not_kept(house: Open) -> None:
    """A use by a source writes nothing: names of tenants end with the process."""
    first = house()
    first.load("a", b"aaa")
    use = AdapterUse(AdapterSource(first.write("b", b"bbb"), 5, "mine"))
    before = first.file.read()
    assert first.manager.resolve([use], "acme").result(5)[0].applied.name == "mine"
    first.manager.saved().result(5)
    assert first.file.read() == before
    assert [info.name for info in house().manager.list(Viewer("acme"))] == ["a"]


def test_bindings_hold_after_a_restart(house: Open) -> None:
    """For the other ways to the files too, and before anything of them was read again."""
    first = house()
    first.load("a", b"aaa", tenants=frozenset({"acme"}))
    (first.root / "hard.safetensors").hardlink_to(first.root / "a.safetensors")
    second = house()
    for path in ("a.safetensors", "hard.safetensors", ""):
        with pytest.raises(AdapterSourceNotFoundError):
            second.manager.resolve([AdapterUse(AdapterSource(str(second.root / path)))], "umbrella").result(5)
    assert second.manager.resolve([AdapterUse(ByName("a"))], "acme").result(5)


def test_a_pin_begins_again_if_the_version_is_replaced_meanwhile(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pinned then is the new one."""
    first = house()
    first.load("a", b"aaa")
    true_files, changes = FileLoader.files, [b"bbb"]

    def files(self: FileLoader, folder: Path) -> AdapterFiles:
        if changes:
            first.write("a", changes.pop())
        return true_files(self, folder)

    monkeypatch.setattr(FileLoader, "files", files)
    pinned = first.pin("a")
    assert pinned.current_digest == f"sha256:{hashlib.sha256(b'bbb').hexdigest()}"

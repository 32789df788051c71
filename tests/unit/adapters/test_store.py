"""The content store: what is complete is visible, what is not leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.adapters.store import ContentStore, FileEntry, StateLockedError, StoreLimits, is_bare, lock_directory
from lora_server.errors import AdapterSourceNotFoundError, DiskFullError, StoreFullError, UploadMismatchError

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 10, "text_encoder/README.md": b""}


def entries(files: dict[str, bytes]) -> list[FileEntry]:
    """What a manifest says of *files*."""
    return [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]


def put(store: ContentStore, files: dict[str, bytes], chunk_bytes: int = 4) -> str:
    """Writes *files* in chunks; returns their digest, held."""
    listed = entries(files)
    with store.begin("neon", listed, bare=is_bare(listed)) as incoming:
        for index, data in enumerate(files.values()):
            for offset in range(0, len(data), chunk_bytes):
                incoming.write(index, offset, data[offset : offset + chunk_bytes])
        return incoming.commit()


def everything(root: Path) -> list[Path]:
    """All files under *root*."""
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_folder_lies_under_the_digest_of_its_manifest(tmp_path: Path) -> None:
    """Every file has its bytes, empty ones too; the digest is the one that a reader of the folder computes."""
    store = ContentStore(tmp_path)
    digest = put(store, FILES)
    place = store.place(digest)
    assert place.name == "neon"
    assert {path.relative_to(place).as_posix(): path.read_bytes() for path in everything(place)} == FILES
    counted = {name: data for name, data in FILES.items() if not name.endswith(".md")}
    other = store.place(put(store, counted))
    assert AdapterFolder(other, [], AdapterRoots([store.root])).read(1 << 20).digest == put(store, counted)
    assert not list((tmp_path / "incoming").iterdir())


def test_a_single_file_is_bare_and_its_digest_its_sha256sum(tmp_path: Path) -> None:
    """Sent again, it is there once."""
    store = ContentStore(tmp_path)
    digest = put(store, {"x.safetensors": b"hello"})
    assert digest == f"sha256:{hashlib.sha256(b'hello').hexdigest()}"
    assert put(store, {"x.safetensors": b"hello"}) == digest
    assert store.place(digest).read_bytes() == b"hello"
    assert store.digests() == {digest}


WRONG = {
    "another byte": lambda incoming: incoming.write(0, 0, b"hellO"),
    "too many bytes": lambda incoming: incoming.write(0, 0, b"hello!"),
    "a gap": lambda incoming: incoming.write(0, 1, b"ello"),
    "another file": lambda incoming: incoming.write(1, 0, b"hello"),
    "too few bytes": lambda incoming: incoming.write(0, 0, b"hell"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_as_promised_leaves_nothing(tmp_path: Path, case: str) -> None:
    """Digest, size and order are checked; the error names the file."""
    store = ContentStore(tmp_path)
    incoming = store.begin("x", entries({"x.safetensors": b"hello"}), bare=True)

    def upload() -> None:
        with incoming:
            WRONG[case](incoming)
            incoming.commit()

    with pytest.raises(UploadMismatchError) as refused:
        upload()
    assert refused.value.metadata["path"] == "x.safetensors"
    assert not store.digests()
    assert not everything(tmp_path)


def test_a_sweep_keeps_what_is_held_or_referenced(tmp_path: Path) -> None:
    """The rest is gone; what a crash left half-written is gone at the next start."""
    store = ContentStore(tmp_path)
    held, referenced, loose = (put(store, {"x.safetensors": data}) for data in (b"a", b"b", b"c"))
    store.release(referenced)
    store.release(loose)
    assert store.sweep(lambda: {referenced}) == 1
    assert store.digests() == {held, referenced}
    with pytest.raises(AdapterSourceNotFoundError):
        store.place(loose)
    (tmp_path / "incoming" / "half").mkdir()
    assert ContentStore(tmp_path).digests() == {held, referenced}
    assert not list((tmp_path / "incoming").iterdir())


def test_a_state_directory_has_one_server(tmp_path: Path) -> None:
    """The second is refused until the first lets go."""
    first = lock_directory(tmp_path / "state")
    with pytest.raises(StateLockedError, match="another running server"):
        lock_directory(tmp_path / "state")
    first.close()
    lock_directory(tmp_path / "state").close()


def test_the_store_has_a_largest_size(tmp_path: Path) -> None:
    """Uploads under way count, what is there already costs nothing; what ends or is swept makes room."""
    store = ContentStore(tmp_path, StoreLimits(max_bytes=10))
    digest = put(store, {"a.safetensors": b"123456"})
    store = ContentStore(tmp_path, StoreLimits(max_bytes=10))
    assert put(store, {"a.safetensors": b"123456"}) == digest
    with store.begin("x", entries({"b.safetensors": b"1234"}), bare=True):
        with pytest.raises(StoreFullError) as error:
            put(store, {"c.safetensors": b"1"})
        assert error.value.metadata == {"needed_bytes": "1", "used_bytes": "10", "max_bytes": "10"}
    put(store, {"c.safetensors": b"1"})
    with pytest.raises(StoreFullError):
        put(store, {"d.safetensors": b"1234"})
    store.release(digest)
    store.sweep(lambda: ())
    put(store, {"d.safetensors": b"1234"})
    assert not list((tmp_path / "incoming").iterdir())


def test_some_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before an upload, for all that are under way, and with every chunk; nothing is left of a refused one."""
    free = [100]
    monkeypatch.setattr(
        "lora_server.adapters.store.shutil.disk_usage", lambda _: SimpleNamespace(total=1000, used=0, free=free[0])
    )
    store = ContentStore(tmp_path, StoreLimits(min_free_bytes=50))
    with pytest.raises(DiskFullError):
        put(store, {"a.safetensors": b"x" * 51})
    with store.begin("x", entries({"a.safetensors": b"x" * 40}), bare=True) as incoming:
        with pytest.raises(DiskFullError):
            put(store, {"b.safetensors": b"x" * 20})
        incoming.write(0, 0, b"x" * 20)
        free[0] = 60
        with pytest.raises(DiskFullError) as error:
            incoming.write(0, 20, b"x" * 20)
        assert error.value.metadata == {"needed_bytes": "20", "free_bytes": "60", "min_free_bytes": "50"}
    assert not everything(tmp_path)
    free[0] = 100
    put(store, {"b.safetensors": b"x" * 50})


def test_a_disk_that_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system answers to a write becomes the same error."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = ContentStore(tmp_path)
    monkeypatch.setattr("lora_server.adapters.store.os.fsync", full)
    with pytest.raises(DiskFullError):
        put(store, {"b.safetensors": b"xy"})
    assert not everything(tmp_path)


def test_everything_is_on_the_disk_before_it_is_visible_and_visible_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name aside; fsync of every file, then of the folders from the innermost; one rename; fsync of the store."""
    store = ContentStore(tmp_path)
    done: list[tuple[str, ...]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_rename(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(("rename", str(old), str(new)))

    def never(*paths: object) -> None:
        raise AssertionError(f"replaced {paths}")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    monkeypatch.setattr(os, "replace", never)
    digest = put(store, FILES)
    aside = Path(done[-2][1])
    root, visible = aside / "neon", tmp_path / "store" / digest.removeprefix("sha256:")
    assert aside.parent == tmp_path / "incoming"
    assert done == [
        *[("fsync", str(root / name)) for name in FILES],
        *[("fsync", str(folder)) for folder in (root / "text_encoder", root, aside)],
        ("rename", str(aside), str(visible)),
        ("fsync", str(tmp_path / "store")),
    ]

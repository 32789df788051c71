"""Uploads whose caller goes away: what fails behind its back is nobody's news, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from lora_api.v1 import adapter_service_pb2 as messages
from lora_server.adapters.store import ContentStore, Incoming
from lora_server.config import LimitsConfig, RpcConfig
from lora_server.errors import (
    AdapterMalformedError,
    InvalidRequestError,
    TooManyUploadsError,
    UploadMismatchError,
)
from lora_server.rpc.uploads import Uploads, receive_upload
from lora_server.types import AdapterSource, ByName, PinLevel

DATA = b"hello"


async def upload(data: bytes) -> AsyncIterator[messages.UploadAdapterRequest]:
    """A file of which *data* arrives."""
    file = messages.UploadFile(path="x.safetensors", size_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    yield messages.UploadAdapterRequest(manifest=messages.UploadManifest(name="x", files=[file]))
    yield messages.UploadAdapterRequest(chunk=messages.UploadChunk(data=data))


class Loading:
    """The part of the manager that an upload needs: a load that is under way until it is told to end."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.released: list[str] = []
        self.begun = threading.Event()

    def load(self, *_: Any, **__: Any) -> Future[Any]:
        """Begins."""
        self.begun.set()
        return self.future

    def release_upload(self, digest: str) -> None:
        """Notes that nobody holds it any more."""
        self.released.append(digest)


async def leave(
    store: ContentStore, adapters: Any, data: bytes, begun: threading.Event, end: Callable[[], None]
) -> Any:
    """Uploads, is cancelled once *begun*, lets it *end*; returns what asyncio would have logged."""
    logged: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    task = asyncio.ensure_future(receive_upload(upload(data), store, adapters, LimitsConfig()))
    assert await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    end()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await asyncio.sleep(0.05)
    gc.collect()
    return logged


async def test_an_upload_that_is_left_at_its_end_fails_unheard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are missing because the caller has gone: no stack trace in the log, and no file."""
    begun, may_end, commit = threading.Event(), threading.Event(), Incoming.commit

    def slow(incoming: Incoming) -> str:
        begun.set()
        may_end.wait(10)
        return commit(incoming)

    monkeypatch.setattr(Incoming, "commit", slow)
    store = ContentStore(tmp_path)
    assert await leave(store, Loading(), DATA[:2], begun, may_end.set) == []
    assert not store.digests()
    assert not list((tmp_path / "incoming").iterdir())


async def test_a_load_that_fails_after_its_caller_has_left_fails_unheard(tmp_path: Path) -> None:
    """The files are let go of, and the log has no stack trace."""
    store, adapters = ContentStore(tmp_path), Loading()
    error = AdapterMalformedError("x", "is broken")
    assert await leave(store, adapters, DATA, adapters.begun, lambda: adapters.future.set_exception(error)) == []
    assert adapters.released == [f"sha256:{hashlib.sha256(DATA).hexdigest()}"]


def messages_of(manifest: messages.UploadManifest, *chunks: bytes) -> list[messages.UploadAdapterRequest]:
    """A manifest, and chunks of its first file."""
    offset, sent = 0, [messages.UploadAdapterRequest(manifest=manifest)]
    for data in chunks:
        sent.append(messages.UploadAdapterRequest(chunk=messages.UploadChunk(data=data, offset_bytes=offset)))
        offset += len(data)
    return sent


def announced(size_bytes: int = len(DATA)) -> messages.UploadManifest:
    """A manifest of one file."""
    file = messages.UploadFile(path="x.safetensors", size_bytes=size_bytes, sha256=hashlib.sha256(DATA).hexdigest())
    return messages.UploadManifest(name="x", files=[file])


async def silent_after(
    sent: list[messages.UploadAdapterRequest], every_s: float = 0.0
) -> AsyncIterator[messages.UploadAdapterRequest]:
    """Sends, and then neither sends nor ends."""
    for each in sent:
        yield each
        await asyncio.sleep(every_s)
    await asyncio.sleep(60)


class Adapters(Loading):
    """Loads at once, and lets go in the store."""

    def __init__(self, store: ContentStore) -> None:
        super().__init__()
        self.store = store
        self.future.set_result("loaded")

    def release_upload(self, digest: str) -> None:
        """As the manager."""
        self.released.append(digest)
        self.store.release(digest)
        self.store.sweep(lambda: ())


@pytest.mark.parametrize("step", ["begin", "commit", "close"])
@pytest.mark.parametrize("late_ms", [0, 20])
async def test_an_upload_that_is_left_while_a_step_runs_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, late_ms: int
) -> None:
    """Neither its files, nor a hold, nor its room, though it is cancelled while a thread is at it, or twice."""
    store = ContentStore(tmp_path)
    adapters, begun, may_end = Adapters(store), threading.Event(), threading.Event()
    owner = ContentStore if step == "begin" else Incoming
    original: Any = getattr(owner, step)

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        assert may_end.wait(10)
        return original(*args, **options)

    monkeypatch.setattr(owner, step, slow)
    task = asyncio.ensure_future(receive_upload(upload(DATA), store, adapters, LimitsConfig()))
    assert await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.sleep(late_ms / 1000)
    task.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    end_s = asyncio.get_running_loop().time() + 10

    def left() -> list[Any]:
        files = [*(tmp_path / "incoming").iterdir(), *(tmp_path / "store").iterdir()]
        return [*store._held, *store._arriving, *files]

    while (remains := left()) and asyncio.get_running_loop().time() < end_s:
        await asyncio.sleep(0.01)
    assert not remains  # not asked again: a sweep may be on its way from one folder to the other


SILENT = {
    "nothing": ([], InvalidRequestError, "did not come within"),
    "bytes that never come": (messages_of(announced()), UploadMismatchError, "nothing more for"),
    "half of them": (messages_of(announced(), DATA[:2]), UploadMismatchError, "2, and nothing more"),
}


@pytest.mark.parametrize("case", SILENT)
async def test_an_upload_of_which_nothing_comes_is_ended(tmp_path: Path, case: str) -> None:
    """And gives its room back."""
    sent, error, text = SILENT[case]
    store = ContentStore(tmp_path)
    with pytest.raises(error, match=text):
        await receive_upload(
            silent_after(sent), store, Adapters(store), LimitsConfig(), RpcConfig(stalled_upload_timeout_s=0.05)
        )
    assert not store._arriving
    assert not list((tmp_path / "incoming").iterdir())


async def test_an_upload_that_drips_is_ended(tmp_path: Path) -> None:
    """Each byte in time is not enough."""
    store, drops = ContentStore(tmp_path), messages_of(announced(1000), *[b"x"] * 1000)
    config = RpcConfig(stalled_upload_timeout_s=5, max_upload_s=0.2)
    with pytest.raises(UploadMismatchError):
        await receive_upload(silent_after(drops, 0.01), store, Adapters(store), LimitsConfig(), config)
    assert not store._arriving


def test_a_tenant_has_so_many_uploads_at_a_time() -> None:
    """Those of others are not counted; what has ended is not either."""
    uploads = Uploads(RpcConfig(max_uploads_per_tenant=1))
    with (
        uploads.one_more("a"),
        uploads.one_more("b"),
        pytest.raises(TooManyUploadsError, match="1 uploads"),
        uploads.one_more("a"),
    ):
        pass
    with uploads.one_more("a"):
        pass


async def test_no_step_of_an_upload_waits_for_the_disk_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, broken, cancelled: nothing is opened, fsynced, renamed, listed or removed by the loop's own thread."""
    store, here = ContentStore(tmp_path), threading.get_ident()
    asked: list[str] = []
    for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir", "listdir", "scandir", "statvfs", "stat"):
        original = getattr(os, name)

        def told(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            if threading.get_ident() == here:
                asked.append(name)
            return original(*args, **options)

        monkeypatch.setattr(os, name, told)
    await receive_upload(upload(DATA), store, Adapters(store), LimitsConfig())
    with pytest.raises(UploadMismatchError):
        await receive_upload(upload(DATA[:2]), store, Adapters(store), LimitsConfig())
    task = asyncio.ensure_future(
        receive_upload(silent_after(messages_of(announced(), DATA[:2])), store, Adapters(store), LimitsConfig())
    )
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    assert asked == []


def test_the_control_plane_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What handlers call on the event loop (load, pin, unpin, unload, get, list, saved) leaves the disk to threads."""
    from tests.unit.adapters.test_storage_faults import House

    (tmp_path / "a.safetensors").write_bytes(DATA)
    house, here = House(tmp_path / "state"), threading.get_ident()
    asked: list[str] = []
    for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir", "listdir", "scandir", "stat", "lstat"):
        original = getattr(os, name)

        def told(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            if threading.get_ident() == here:
                asked.append(name)
            return original(*args, **options)

        monkeypatch.setattr(os, name, told)
    manager = house.manager
    manager.load(AdapterSource(str(tmp_path / "a.safetensors"), name="a"), replace=True).result(5)
    manager.pin(ByName("a"), PinLevel.HOST).result(5)
    manager.get(ByName("a"))
    manager.unpin(ByName("a"))
    manager.list()
    manager.unload(ByName("a"), drain=True)
    manager.saved().result(5)
    monkeypatch.undo()
    house.close()
    assert asked == []

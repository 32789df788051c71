"""Uploads whose caller goes away: what fails behind its back is nobody's news, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from lora_api.v1 import adapter_service_pb2 as messages
from lora_server.adapters.store import ContentStore, Incoming
from lora_server.config import LimitsConfig
from lora_server.errors import AdapterMalformedError
from lora_server.rpc.uploads import receive_upload

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

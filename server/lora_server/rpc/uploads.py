"""UploadAdapter: from a stream of messages to files in the store, loaded and acknowledged.

Owns the order of messages and the hand-over to worker threads; what bytes are right is the store's to say.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import structlog
from lora_api.v1 import adapter_service_pb2 as messages

from lora_server.adapters.api import LoadOutcome
from lora_server.adapters.incoming import FileEntry, Incoming, is_bare
from lora_server.adapters.naming import stable_adapter_id
from lora_server.adapters.source import UPLOAD_SCHEME
from lora_server.adapters.store import ContentStore
from lora_server.config import LimitsConfig, RpcConfig
from lora_server.errors import (
    AdapterFileTooLargeError,
    FieldFault,
    InvalidRequestError,
    LoraServerError,
    TooManyUploadsError,
)
from lora_server.rpc.backend import Adapters
from lora_server.rpc.convert import shortest
from lora_server.rpc.validate import check_manifest
from lora_server.security.caller import current_caller
from lora_server.types import AdapterSource, Digest

_log = structlog.get_logger(__name__)

CHUNK_BYTES = 1024 * 1024
T = TypeVar("T")
Messages = AsyncIterator[messages.UploadAdapterRequest]


class Uploads:
    """Which uploads are under way, of whom. Event loop only."""

    def __init__(self, config: RpcConfig) -> None:
        self.config = config
        self._of: Counter[str] = Counter()

    @contextmanager
    def one_more(self, tenant: str) -> Iterator[None]:
        """Counts an upload of *tenant* for as long as it lasts; TooManyUploadsError if it has as many as it may."""
        if self._of[tenant] >= self.config.max_uploads_per_tenant:
            raise TooManyUploadsError(self.config.max_uploads_per_tenant)
        self._of[tenant] += 1
        try:
            yield
        finally:
            self._of[tenant] -= 1
            if not self._of[tenant]:
                del self._of[tenant]


async def receive_upload(
    requests: Messages,
    store: ContentStore,
    adapters: Adapters,
    limits: LimitsConfig,
    config: RpcConfig | None = None,
) -> LoadOutcome:
    """Writes what arrives into *store* and loads it; see the contract. *config* has the time limits.

    A call that is cancelled before its files are whole, or that sends nothing for a while, leaves nothing; one that is
    cancelled later may still be loaded.
    """
    patience = _Patience(requests, config or RpcConfig())
    manifest = await _manifest(patience)
    check_manifest(manifest)
    files = [FileEntry(file.path, file.size_bytes, file.sha256) for file in manifest.files]
    for file in files:
        if file.size_bytes > limits.max_adapter_file_bytes:
            raise AdapterFileTooLargeError(manifest.name, file.path, file.size_bytes, limits.max_adapter_file_bytes)
    begin = partial(store.begin, manifest.name, files, bare=is_bare(files))
    incoming = await _in_thread(begin, undo=lambda begun: begun.close())
    try:
        await _receive_chunks(patience, incoming)
        digest = await _in_thread(incoming.commit, undo=adapters.release_upload)
        loading = _unheard(asyncio.ensure_future(_load(manifest, digest, adapters)))  # which lets go of it
    finally:
        await _in_thread(incoming.close)
    return await asyncio.shield(loading)


async def _load(manifest: messages.UploadManifest, digest: Digest, adapters: Adapters) -> LoadOutcome:
    """Loads a complete upload, and lets go of it: what could not be loaded is removed."""
    path = UPLOAD_SCHEME + digest
    try:
        loading = adapters.load(
            AdapterSource(path, id=stable_adapter_id(UPLOAD_SCHEME + manifest.name), name=manifest.name),
            default_scale=shortest(manifest.default_scale) if manifest.HasField("default_scale") else None,
            replace=manifest.replace,
            allow_partial=manifest.allow_partial,
            tenants=frozenset(manifest.tenants.names) if manifest.HasField("tenants") else None,
            viewer=current_caller().viewer,
        )
        return await asyncio.wrap_future(loading)
    finally:
        await asyncio.to_thread(adapters.release_upload, digest)


class _Patience:
    """The messages of an upload, each of which must come in time, and all of them together."""

    def __init__(self, requests: Messages, config: RpcConfig) -> None:
        self._requests = requests
        self._idle_s = config.stalled_upload_timeout_s
        self._end_s = asyncio.get_running_loop().time() + config.max_upload_s

    async def next(self, late: Callable[[float], LoraServerError]) -> messages.UploadAdapterRequest | None:
        """Returns the next message, None after the last; raises what *late* makes of the seconds waited in vain."""
        left_s = self._end_s - asyncio.get_running_loop().time()
        wait_s = min(self._idle_s, left_s)
        try:
            async with asyncio.timeout(max(wait_s, 0)):
                return await anext(self._requests, None)
        except TimeoutError:
            raise late(round(max(wait_s, 0), 1)) from None


async def _manifest(patience: _Patience) -> messages.UploadManifest:
    def late(waited_s: float) -> LoraServerError:
        return InvalidRequestError([FieldFault("manifest", f"did not come within {waited_s:g} s")])

    request = await patience.next(late)
    if request is None or request.WhichOneof("part") != "manifest":
        raise InvalidRequestError([FieldFault("manifest", "must be the first message")])
    return request.manifest


async def _receive_chunks(patience: _Patience, incoming: Incoming) -> None:
    while (request := await patience.next(incoming.stalled)) is not None:
        if request.WhichOneof("part") != "chunk":
            raise InvalidRequestError([FieldFault("chunk", "is required in every message but the first")])
        chunk = request.chunk
        if not 0 < len(chunk.data) <= CHUNK_BYTES:
            raise InvalidRequestError([FieldFault("chunk.data", f"must have 1 to {CHUNK_BYTES} bytes")])
        await _in_thread(partial(incoming.write, chunk.file_index, chunk.offset_bytes, chunk.data))


async def _in_thread(work: Callable[[], T], undo: Callable[[T], object] = lambda _: None) -> T:
    """Runs *work*, which blocks on the disk, elsewhere; when cancelled, waits for its end, so that nothing is left.

    What it returns while nobody waits any more goes to *undo*, which may block too.
    """
    lock, results, left = threading.Lock(), list[T](), threading.Event()

    def run() -> T:
        result = work()
        with lock:
            results.append(result)
            abandoned = left.is_set()
        if abandoned:
            undo(result)
        return result

    task = _unheard(asyncio.ensure_future(asyncio.to_thread(run)))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with lock:
            left.set()
            missed = list(results)
        undoing = [_unheard(asyncio.ensure_future(asyncio.to_thread(undo, result))) for result in missed]
        await asyncio.gather(task, *undoing, return_exceptions=True)
        raise


def _unheard(future: asyncio.Future[T]) -> asyncio.Future[T]:
    """Lets *future* fail unheard once its caller has gone; asyncio would log a stack trace. Who awaits it hears it.

    What is no fault of the upload, such as a full disk, is logged.
    """
    future.add_done_callback(_log_fault)
    return future


def _log_fault(done: asyncio.Future[T]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None and not isinstance(error, LoraServerError):
        _log.error("an upload failed", error=repr(error))

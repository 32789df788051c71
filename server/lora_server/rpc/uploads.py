"""UploadAdapter: from a stream of messages to files in the store, loaded and acknowledged.

Owns the order of messages and the hand-over to worker threads; what bytes are right is the store's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import structlog
from lora_api.v1 import adapter_service_pb2 as messages

from lora_server.adapters.api import LoadOutcome
from lora_server.adapters.naming import stable_adapter_id
from lora_server.adapters.source import UPLOAD_SCHEME
from lora_server.adapters.store import ContentStore, FileEntry, Incoming, is_bare
from lora_server.config import LimitsConfig
from lora_server.errors import AdapterFileTooLargeError, FieldFault, InvalidRequestError, LoraServerError
from lora_server.rpc.backend import Adapters
from lora_server.rpc.convert import shortest
from lora_server.rpc.validate import check_manifest
from lora_server.security.caller import current_caller
from lora_server.types import AdapterSource

_log = structlog.get_logger(__name__)

CHUNK_BYTES = 1024 * 1024
T = TypeVar("T")


async def receive_upload(
    requests: AsyncIterator[messages.UploadAdapterRequest],
    store: ContentStore,
    adapters: Adapters,
    limits: LimitsConfig,
) -> LoadOutcome:
    """Writes what arrives into *store* and loads it; see the contract.

    A call that is cancelled while files arrive leaves nothing; one that is cancelled later may still be loaded.
    """
    manifest = await _manifest(requests)
    check_manifest(manifest)
    files = [FileEntry(file.path, file.size_bytes, file.sha256) for file in manifest.files]
    for file in files:
        if file.size_bytes > limits.max_adapter_file_bytes:
            raise AdapterFileTooLargeError(manifest.name, file.path, file.size_bytes, limits.max_adapter_file_bytes)
    with store.begin(manifest.name, files, bare=is_bare(files)) as incoming:
        await _receive_chunks(requests, incoming)
        digest = await _in_thread(incoming.commit)
    source = AdapterSource(
        UPLOAD_SCHEME + digest, id=stable_adapter_id(UPLOAD_SCHEME + manifest.name), name=manifest.name
    )
    loading = adapters.load(
        source,
        default_scale=shortest(manifest.default_scale) if manifest.HasField("default_scale") else None,
        replace=manifest.replace,
        allow_partial=manifest.allow_partial,
        tenants=frozenset(manifest.tenants.names) if manifest.HasField("tenants") else None,
        viewer=current_caller().viewer,
    )
    loading.add_done_callback(lambda _: adapters.release_upload(digest))
    return await asyncio.shield(_unheard(asyncio.wrap_future(loading)))


async def _manifest(requests: AsyncIterator[messages.UploadAdapterRequest]) -> messages.UploadManifest:
    async for request in requests:
        if request.WhichOneof("part") == "manifest":
            return request.manifest
        break
    raise InvalidRequestError([FieldFault("manifest", "must be the first message")])


async def _receive_chunks(requests: AsyncIterator[messages.UploadAdapterRequest], incoming: Incoming) -> None:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidRequestError([FieldFault("chunk", "is required in every message but the first")])
        chunk = request.chunk
        if not 0 < len(chunk.data) <= CHUNK_BYTES:
            raise InvalidRequestError([FieldFault("chunk.data", f"must have 1 to {CHUNK_BYTES} bytes")])
        index, offset_bytes, data = chunk.file_index, chunk.offset_bytes, chunk.data
        await _in_thread(lambda: incoming.write(index, offset_bytes, data))  # noqa: B023 - awaited here


async def _in_thread(work: Callable[[], T]) -> T:
    """Runs *work*, which blocks on the disk, elsewhere; when cancelled, waits for its end, so that nothing is left."""
    task = _unheard(asyncio.ensure_future(asyncio.to_thread(work)))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
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

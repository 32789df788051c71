"""grpc.health.v1.Health: what the whole server and each service is. Event loop only.

Nobody is waited for when a status changes: each watcher is woken and sends the latest by itself. The servicer of
grpc_health sends to one watcher after another with its lock held, so that one who does not read stops all others, the
start and the end of the server. Strangers may call it, so that everything is bounded: the name of a service, the calls
of a connection, the watchers (the oldest gives way), and how long one watches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from lora_server.rpc.connections import Connection, Connections, Verdict
from lora_server.rpc.refusals import TOO_MANY
from lora_server.rpc.status import Status, end
from lora_server.rpc.visits import Visits

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_MAX_REQUEST_BYTES = 1024
_READ_TIMEOUT_S = 10.0
_MAX_READS, _MAX_READS_OF_ONE, _READ_GRACE_S = 64, 16, 0.5
_MAX_WATCHERS, _MAX_WATCHERS_OF_ONE = 256, 64
MAX_WATCH_S = 15 * 60.0
_SEND_TIMEOUT_S = 10.0
_NO_NAME = Status(grpc.StatusCode.INVALID_ARGUMENT, "not the name of a service")
_NOT_FOUND = Status(grpc.StatusCode.NOT_FOUND, "no such service")
_WATCHED_ENOUGH = Status(grpc.StatusCode.UNAVAILABLE, "watched for long enough; watch again")
_Response = health_pb2.HealthCheckResponse


class Health:
    """The statuses, and the handlers of Check and Watch."""

    def __init__(self, services: Sequence[str], connections: Connections, max_watch_s: float = MAX_WATCH_S) -> None:
        """Knows *services*, and the empty name, which is the whole server; all begin as NOT_SERVING."""
        self._names = frozenset(["", *services])
        self._status: int = _Response.NOT_SERVING
        self._connections = connections
        self._max_watch_s = max_watch_s
        self._reads = Visits(_MAX_READS, _MAX_READS_OF_ONE, _READ_GRACE_S)
        self._watchers = Visits(_MAX_WATCHERS, _MAX_WATCHERS_OF_ONE)
        self._wake: set[asyncio.Event] = set()

    def set(self, status: int) -> None:
        """Changes the status of all services, and wakes who watches; waits for nobody."""
        self._status = status
        for event in self._wake:
            event.set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the handlers to *server*."""
        handlers: dict[str, Any] = {
            "Check": grpc.stream_stream_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def _check(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        connection = self._connections.of(context.peer())
        with connection.call(context):
            service = await self._service(requests, connection, context)
            if service not in self._names:
                await end(context, _NOT_FOUND)
            await _send(context, self._status)
        return
        yield b""  # makes it a generator

    async def _watch(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        connection = self._connections.of(context.peer())
        with connection.call(context):
            service = await self._service(requests, connection, context)
            try:
                async with self._watchers.stay(connection, self._max_watch_s):
                    await self._send_changes(service, context)
            except TimeoutError:
                await end(context, _WATCHED_ENOUGH)
        return
        yield b""

    async def _send_changes(self, service: str, context: Any) -> None:
        changed, sent = asyncio.Event(), None
        self._wake.add(changed)
        try:
            while True:
                status = self._status if service in self._names else _Response.SERVICE_UNKNOWN
                if status != sent:
                    await _send(context, status)
                    sent = status
                await changed.wait()
                changed.clear()
        finally:
            self._wake.discard(changed)

    async def _service(self, requests: AsyncIterator[bytes], connection: Connection, context: Any) -> str:
        """Returns the name that a stranger asks for, or ends the call."""
        verdict = Verdict.ANSWER if connection.known else self._connections.stranger(connection)
        if verdict is Verdict.HOLD:
            await self._connections.hold()
        if verdict is not Verdict.ANSWER:
            await end(context, TOO_MANY)
        try:
            async with self._reads.stay(connection, _READ_TIMEOUT_S):
                raw = await anext(requests, b"")
            if len(raw) <= _MAX_REQUEST_BYTES:
                return str(health_pb2.HealthCheckRequest.FromString(raw).service)
        except (TimeoutError, DecodeError):
            pass
        return await end(context, _NO_NAME)


async def _send(context: Any, status: int) -> None:
    """Sends a status, or cancels the call: a peer that has gone, or does not read, need not hear it."""
    try:
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await context.write(_Response(status=status).SerializeToString())
    except (TimeoutError, grpc.aio.BaseError):
        raise asyncio.CancelledError from None

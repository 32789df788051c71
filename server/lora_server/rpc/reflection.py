"""Server reflection, by grpc_reflection's own servicer, to a bounded number of streams for a bounded time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lora_server.rpc.connections import Connections
from lora_server.rpc.status import Status, end
from lora_server.rpc.visits import Visits

_MAX_REQUEST_BYTES = 4096
_MAX_STREAMS, _MAX_STREAMS_OF_ONE = 16, 4
_MAX_STREAM_S = 60.0
_OPEN_ENOUGH = Status(grpc.StatusCode.UNAVAILABLE, "the stream was open for long enough; ask again")
_NO_REQUEST = Status(grpc.StatusCode.INVALID_ARGUMENT, f"not a request of at most {_MAX_REQUEST_BYTES} bytes")


class Reflection:
    """The handler of ServerReflectionInfo."""

    def __init__(self, services: Sequence[str], connections: Connections) -> None:
        """Tells of *services*, and of itself."""
        self._servicer: Any = reflection.aio.ReflectionServicer([*services, reflection.SERVICE_NAME])
        self._connections = connections
        self._streams = Visits(_MAX_STREAMS, _MAX_STREAMS_OF_ONE)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the handler to *server*."""
        handlers: dict[str, Any] = {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, handlers),))

    async def _answer(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        connection = self._connections.of(context.peer())
        connection.known = True
        with connection.call(context) as ended:
            try:
                await context.send_initial_metadata(())  # so that a status can be sent after a message that is stuck
                async with self._streams.stay(connection, _MAX_STREAM_S):
                    async for response in self._servicer.ServerReflectionInfo(_parsed(requests), context):
                        await context.write(response.SerializeToString())
            except TimeoutError:
                ended()
                await end(context, _OPEN_ENOUGH)
            except (DecodeError, ValueError):
                await end(context, _NO_REQUEST)
        return
        yield b""  # makes it a generator


async def _parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for raw in requests:
        if len(raw) > _MAX_REQUEST_BYTES:
            raise ValueError(len(raw))
        yield reflection_pb2.ServerReflectionRequest.FromString(raw)

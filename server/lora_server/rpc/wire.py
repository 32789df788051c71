"""Our methods as gRPC has them: a request is read once its caller is known, within bounds of bytes and time.

Every method is registered as one that streams both ways, which is the same on the wire. gRPC would read the message of
a unary request before anybody is asked, however long it takes; so it is read here, and what nobody reads takes no more
memory than the window of its stream.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from lora_server.config import LimitsConfig
from lora_server.errors import FieldFault, InvalidRequestError, TooManyCallsError
from lora_server.rpc.connections import Connection, Connections
from lora_server.rpc.servicers import Border, Call
from lora_server.rpc.visits import Visits
from lora_server.security.caller import current_caller

MAX_UPLOAD_MESSAGE_BYTES = 1024 * 1024 + 64 * 1024
"""A chunk of an upload, with what is around it."""

_ANSWER_BYTES = {"list_adapters": 4 * 1024 * 1024}
"""What answers may have that are large and made in parts, so that others begin meanwhile."""

READ_TIMEOUT_S = 20.0
_SMALL_BYTES = 256 * 1024
_BYTES_A_CHARACTER = 4
_MAX_READS, _MAX_READS_OF_ONE, _READ_GRACE_S = 64, 16, 0.5
"""Of one tenant, of one of its connections."""


def max_request_bytes(limits: LimitsConfig) -> int:
    """The most bytes of a request that is one message: two prompts, and the rest."""
    return _SMALL_BYTES + 2 * _BYTES_A_CHARACTER * limits.max_prompt_chars


def max_message_bytes(limits: LimitsConfig) -> int:
    """The most bytes of any message."""
    return max(MAX_UPLOAD_MESSAGE_BYTES, max_request_bytes(limits))


def snake_case(method: str) -> str:
    """`stream_generate` of /lora_api.v1.GenerationService/StreamGenerate, as the border calls it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method.rpartition("/")[2]).lower()


class Reader:
    """Reads requests of one message; too many that take their time end the oldest. Event loop only.

    Each tenant has places of its own, so that what one of them never sends whole holds up no other.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._reads: defaultdict[str, Visits] = defaultdict(
            lambda: Visits(_MAX_READS, _MAX_READS_OF_ONE, _READ_GRACE_S)
        )

    async def one(self, requests: AsyncIterator[bytes], make: type[Message], connection: Connection) -> Message:
        """Returns the one message of a request.

        Raises:
            InvalidRequestError: If it does not come in time, is too large or is none.
            TooManyCallsError: If newer ones took its place.
        """
        raw = await self._raw(requests, connection)
        if raw is None:
            raise InvalidRequestError([FieldFault("request", "is missing")])
        if len(raw) > self._most_bytes:
            raise InvalidRequestError([FieldFault("request", f"has {len(raw)} bytes; at most {self._most_bytes}")])
        return _parse(raw, make)

    async def _raw(self, requests: AsyncIterator[bytes], connection: Connection) -> bytes | None:
        try:
            async with self._reads[current_caller().tenant].stay(connection, READ_TIMEOUT_S) as visit:
                return await anext(requests, None)
        except TimeoutError:
            if visit.displaced:
                raise TooManyCallsError("requests that have not arrived whole", "send them one after another") from None
            fault = FieldFault("request", f"did not arrive whole within {READ_TIMEOUT_S:g} s")
            raise InvalidRequestError([fault]) from None


async def _each(requests: AsyncIterator[bytes], make: type[Message]) -> AsyncIterator[Message]:
    async for raw in requests:
        yield _parse(raw, make)


def _parse(raw: bytes, make: type[Message]) -> Message:
    try:
        return make.FromString(raw)
    except DecodeError:
        raise InvalidRequestError([FieldFault("request", f"is no {make.DESCRIPTOR.name}")]) from None


@dataclass(frozen=True, slots=True)
class Wire:
    """What turns the border's calls into gRPC's handlers."""

    border: Border
    connections: Connections
    reader: Reader

    def add(self, service: ServiceDescriptor, server: grpc.aio.Server) -> None:
        """Adds all methods of *service* to *server*."""
        handlers = {method.name: self._handler(method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _handler(self, method: MethodDescriptor) -> Any:
        make = message_factory.GetMessageClass(method.input_type)
        name = snake_case(method.name)
        expected = _ANSWER_BYTES.get(name, 0)

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            connection = self.connections.of(context.peer())
            connection.known = True

            async def receive() -> Any:
                await connection.room(expected)
                making.enter_context(connection.expecting(expected))
                if method.client_streaming:
                    return _each(requests, make)
                return await self.reader.one(requests, make, connection)

            begun, making = False, contextlib.ExitStack()

            async def send(response: Message) -> None:
                nonlocal begun
                raw = response.SerializeToString()
                if not begun:  # apart: if the first message is stuck, a status cannot be sent after it otherwise
                    begun = True
                    await context.send_initial_metadata(())
                with connection.sending(len(raw)):
                    making.close()
                    await context.write(raw)

            with making, connection.call(context) as ended:
                await self.border.run(Call(name, method.server_streaming, receive, send, ended), context)
            return
            yield b""  # the instrumentation of traces knows asynchronous generators only

        return grpc.stream_stream_rpc_method_handler(handle)

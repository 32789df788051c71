"""Nobody holds the event loop with one message: every field of every request, blown up to what a message may have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from lora_server.config import LimitsConfig, ServerConfig
from lora_server.errors import AdapterNotFoundError
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import _SERVICES, RpcServer
from lora_server.rpc.wire import max_message_bytes, max_request_bytes

from tests.blow_up import blown_up
from tests.unit.monitoring.house import House

MOST_S = 0.5
"""Ten times what the loop may stand still: the machine may be busy."""

EXPECTED = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED")
METHODS = [
    *(method for service in _SERVICES for method in service.methods),
    *health_pb2.DESCRIPTOR.services_by_name["Health"].methods,
    *reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods,
]


class Nobody(House):
    """An engine and a manager who know nothing, and are asked nothing that is not valid."""

    store = object()

    def page(self, *_: Any) -> tuple[Any, ...]:
        """No adapters."""
        return ()

    def get(self, ref: Any, *_: Any, **__: Any) -> Any:
        """None."""
        raise AdapterNotFoundError("x")

    pin = unpin = load = unload = get


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A server that serves, in this process, whose event loop is this one."""
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0"}))
    address = await server.start()
    nobody: Any = Nobody()
    await server.serve(Backend(nobody, nobody, "1", 0.0, 60.0))
    yield address
    await server.stop()


class Lag:
    """The longest time for which the event loop did nothing else."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        """Measures for ever."""
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(0.001)
            self.worst_s = max(self.worst_s, time.monotonic() - began_s)


def ask(channel: grpc.Channel, method: MethodDescriptor, content: bytes) -> str:
    """Sends it; returns the code of the answer. Blocks."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    try:
        for _ in channel.stream_stream(name)(iter([content]), timeout=10):
            return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)
    return "NONE"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_no_field_of_any_request_holds_the_loop(address: str, method: MethodDescriptor) -> None:
    """Messages as large as may be are answered at once, by something that is expected."""
    limits, lag = LimitsConfig(), Lag()
    most = max_message_bytes(limits) if method.client_streaming else max_request_bytes(limits)
    watching = asyncio.create_task(lag.watch())
    try:
        with grpc.insecure_channel(address) as channel:
            for path, content in blown_up(method.input_type, most - 64):
                lag.worst_s = 0.0
                code = await asyncio.to_thread(ask, channel, method, content)
                assert lag.worst_s < MOST_S, path
                assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"), (
                    path
                )
    finally:
        watching.cancel()

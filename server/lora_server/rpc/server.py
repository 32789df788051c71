"""The listening side: binds, serves health and reflection from the start, drains and stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from lora_api.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

from lora_server.config import ServerConfig
from lora_server.observer import Observer, SilentObserver
from lora_server.rpc.auth import AuthInterceptor
from lora_server.rpc.backend import Backend
from lora_server.rpc.handlers import Handlers
from lora_server.rpc.listen import bind
from lora_server.rpc.servicers import AdapterServicer, Border, Gate, GenerationServicer, ServerServicer
from lora_server.rpc.uploads import Uploads
from lora_server.rpc.watching import Watchers
from lora_server.security.tokens import read_tokens
from lora_server.security.watched import Watched

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_service_pb2, "GenerationService"),
        (adapter_service_pb2, "AdapterService"),
        (server_service_pb2, "ServerService"),
    )
)
# Tried values: see the project's facts on gRPC. Without so_reuseport 0 two servers may share a port unawares.
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60 * 1000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing is gone after this
]
_STOP_GRACE_S = 1.0
_LINGER_S = 0.1


class RpcServer:
    """A gRPC server in the states starting, serving, draining, stopped. Event loop only."""

    def __init__(
        self, config: ServerConfig, observer: Observer | None = None, interceptors: Sequence[Any] = ()
    ) -> None:
        """Tells *observer* of every call; *interceptors* are grpc.aio's, the first the outermost, before our own."""
        self._observer = observer or SilentObserver()
        self._outer_interceptors = list(interceptors)
        self._config = config
        self._gate = Gate()
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Binds and listens; health is NOT_SERVING until `serve`. Returns the address as bound.

        Raises:
            OSError: If the address cannot be bound, or a file of certificates or tokens not read.
            ValueError: If such a file cannot be used.
        """
        server = grpc.aio.server(interceptors=[*self._outer_interceptors, *self._interceptors()], options=_OPTIONS)
        border = Border(self._gate, self._observer, self._config.rpc.stalled_reader_timeout_s)
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(border), server)
        adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(border), server)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(border), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.rpc.reflection:
            reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = bind(server, self._config)
        await server.start()
        self._server = server
        return address

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        file = self._config.auth.token_file
        if file is None:
            return []
        return [AuthInterceptor(Watched("tokens", [file], lambda: read_tokens(file)), self._observer)]

    async def serve(self, backend: Backend) -> None:
        """Lets calls in; health is SERVING from now on."""
        self._gate.handlers = Handlers(
            backend, self._config.limits, Watchers(self._config.rpc.max_watchers), Uploads(self._config.rpc)
        )
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Lets no more calls in, and waits for those inside, at most the configured time. Idempotent."""
        self._gate.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        # Not server.stop(grace): an open Health.Watch would make it wait the whole grace.
        try:
            await asyncio.wait_for(self._gate.wait_empty(), self._config.rpc.drain_timeout_s)
        except TimeoutError:
            return

    async def stop(self) -> None:
        """Ends everything within about two seconds. Idempotent."""
        self._gate.draining = True
        if self._server is not None:
            server, self._server = self._server, None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gate.wait_empty(), _STOP_GRACE_S)
            # A connection that closes upon something unread is reset, and its client never sees why its call ended.
            await asyncio.sleep(_LINGER_S)
            await server.stop(_STOP_GRACE_S)

    async def _set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)

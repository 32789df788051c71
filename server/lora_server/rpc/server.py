"""The listening side: binds, serves health and reflection from the start, drains and stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from lora_api.v1 import adapter_service_pb2, generation_service_pb2, server_service_pb2

from lora_server.config import ServerConfig
from lora_server.observer import Observer, SilentObserver
from lora_server.rpc.auth import AuthInterceptor
from lora_server.rpc.backend import Backend
from lora_server.rpc.connections import MAX_STREAMS, Connections
from lora_server.rpc.handlers import Handlers
from lora_server.rpc.health import SERVICE_NAME, Health
from lora_server.rpc.listen import bind
from lora_server.rpc.reflection import Reflection
from lora_server.rpc.refusals import Refusals
from lora_server.rpc.servicers import Border, Gate
from lora_server.rpc.sockets import raise_descriptor_limit
from lora_server.rpc.uploads import Uploads
from lora_server.rpc.watching import Watchers
from lora_server.rpc.wire import Reader, Wire, max_message_bytes, max_request_bytes
from lora_server.security.tokens import watched_tokens

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (generation_service_pb2, "GenerationService"),
        (adapter_service_pb2, "AdapterService"),
        (server_service_pb2, "ServerService"),
    )
)
# Tried values: see the project's facts on gRPC. Without so_reuseport 0 two servers may share a port unawares.
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    # A window follows the messages that are read, not the bandwidth: what nobody reads takes 64 KiB a stream.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Refuses streams while ended ones are not freed yet: callers who keep to the limit, too.
    ("grpc.http.overload_protection", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60 * 1000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing is gone after this
]
_DESCRIPTORS_FOR_OTHERS = 256
"""What the rest of the process is left: adapters, state, log, metrics; of few descriptors, half."""

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
        self._max_connections = _max_connections(config.rpc.max_connections)
        self._connections = Connections(self._max_connections, config.rpc.stalled_reader_timeout_s)
        self._health = Health([service.full_name for service in _SERVICES], self._connections)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Binds and listens; health is NOT_SERVING until `serve`. Returns the address as bound.

        Raises:
            OSError: If the address cannot be bound, or a file of certificates or tokens not read.
            ValueError: If such a file cannot be used.
        """
        server = grpc.aio.server(interceptors=[*self._outer_interceptors, self._auth()], options=self._options())
        border = Border(self._gate, self._observer, self._config.rpc.stalled_reader_timeout_s)
        wire = Wire(border, self._connections, Reader(max_request_bytes(self._config.limits)))
        for service in _SERVICES:
            wire.add(service, server)
        self._health.add_to(server)
        if self._config.rpc.reflection:
            Reflection([*(each.full_name for each in _SERVICES), SERVICE_NAME], self._connections).add_to(server)
        address = bind(server, self._config)
        await server.start()
        self._connections.start(address)
        self._server = server
        return address

    def _options(self) -> list[tuple[str, int]]:
        return [
            *_OPTIONS,
            ("grpc.max_receive_message_length", max_message_bytes(self._config.limits)),
            ("grpc.max_allowed_incoming_connections", self._max_connections),
        ]

    def _auth(self) -> AuthInterceptor:
        file = self._config.auth.token_file
        tokens = None if file is None else watched_tokens(file)
        return AuthInterceptor(tokens, Refusals(self._connections, self._observer))

    async def serve(self, backend: Backend) -> None:
        """Lets calls in; health is SERVING from now on."""
        self._gate.handlers = Handlers(
            backend, self._config.limits, Watchers(self._config.rpc.max_watchers), Uploads(self._config.rpc)
        )
        self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Lets no more calls in, and waits for those inside, at most the configured time. Idempotent."""
        self._gate.draining = True
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
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
        self._connections.stop()


def _max_connections(wanted: int) -> int:
    """How many connections there may be, by what descriptors the process may have."""
    descriptors = raise_descriptor_limit()
    return max(1, min(wanted, max(descriptors - _DESCRIPTORS_FOR_OTHERS, descriptors // 2)))

"""Asks a server for its health, as grpc_health_probe does, exit codes included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_client.addresses import proxy_options, target

SERVING, BAD_USAGE, NO_CONNECTION, FAILED, NOT_SERVING = range(5)
"""Exit codes, those of grpc_health_probe."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What to ask, and how; certificates are PEM bytes. Without TLS all of them are None."""

    address: str
    service: str = ""
    timeout_s: float = 5.0
    tls: bool = False
    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def ask(self) -> tuple[int, str]:
        """Returns the exit code and a line about it. Blocks for at most *timeout_s* to connect, and as long to ask."""
        with self._channel() as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=self.timeout_s)
            except grpc.FutureTimeoutError:
                return NO_CONNECTION, f"cannot connect to {self.address} within {self.timeout_s:g} s"
            try:
                request = health_pb2.HealthCheckRequest(service=self.service)
                stub: Any = health_pb2_grpc.HealthStub(channel)
                response = stub.Check(request, timeout=self.timeout_s)
            except grpc.RpcError as error:
                return FAILED, f"the health check failed: {error.code().name}: {error.details()}"
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return (SERVING if status == "SERVING" else NOT_SERVING), status

    def _channel(self) -> grpc.Channel:
        options = proxy_options(self.address)
        if not self.tls:
            return grpc.insecure_channel(self.address, options=options)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        credentials = grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.secure_channel(self.address, credentials, options=options)


def reachable(listen: str) -> str:
    """Returns the address under which a server that listens on *listen* is reached from its own machine.

    Raises:
        ValueError: If it is no address.
    """
    address = target(listen)
    host, _, port = address.rpartition(":")
    wildcard = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
    return f"{wildcard[host]}:{port}" if host in wildcard else address

"""How the client connects: channel options, TLS, and the metadata of a call."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from lora_client.types import AdapterUse

DEFAULT_SERVER = "127.0.0.1:50051"
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2.5,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
]
"""Options of every channel; only UNAVAILABLE is retried, and a request id makes that safe."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates of a TLS connection, PEM bytes; None takes the system's roots, or no client certificate.

    Attributes:
        root_certificates: Whom to trust.
        private_key, certificate_chain: The client's own, for mutual TLS.
        server_name: The name in the server's certificate, if it differs from the address.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns gRPC's form of these certificates."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)

    def options(self) -> list[tuple[str, int | str]]:
        """Returns the options that a channel needs beside the credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def bearer_metadata(server: str, tls: Tls | None, token: str | None) -> tuple[tuple[str, str], ...]:
    """Returns the metadata that carries *token*; none without one.

    Raises:
        ValueError: If it would go over a network in plain text, or is no token.
    """
    if not token:
        return ()
    if tls is None and not is_local(server):
        raise ValueError(f"a token is never sent in plain text to {server}: use TLS, loopback or a Unix socket")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is printable ASCII without blanks")
    return (("authorization", f"Bearer {token}"),)


def is_local(server: str) -> bool:
    """Whether *server* is a Unix socket, or on loopback by number or as localhost."""
    if server.startswith("unix:"):
        return True
    host = server.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plain_options(server: str) -> list[tuple[str, int | str]]:
    """Returns the options of a plain channel; what is local goes through no proxy, whatever the environment says."""
    return [*OPTIONS, ("grpc.enable_http_proxy", 0)] if is_local(server) else OPTIONS


def call_metadata(adapters: Sequence[AdapterUse]) -> tuple[tuple[str, str], ...]:
    """Returns `x-adapter-id`, a hash of the composition: a balancer may keep an adapter's requests together."""
    parts = sorted(str(use.name or use.digest or use.path or use.id) for use in adapters)
    return (("x-adapter-id", hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]),)

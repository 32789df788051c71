"""How the client connects: channel options, TLS, and the metadata of a call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from lora_client.addresses import is_local, proxy_options
from lora_client.types import AdapterUse

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

    Raises:
        ValueError: If a certificate is no PEM bytes, or the private key or its certificate is missing.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("root_certificates", "private_key", "certificate_chain"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, bytes) or b"-----BEGIN " not in value):
                raise ValueError(f"{name} must be the bytes of a PEM file, such as b'-----BEGIN CERTIFICATE-----...'")
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain belong together")

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


def channel_options(server: str, tls: Tls | None) -> list[tuple[str, int | str]]:
    """Returns the options of a channel to *server*; what is on this machine goes through no proxy, with TLS or without.

    May look up the name of this machine.
    """
    return [*OPTIONS, *proxy_options(server), *(tls.options() if tls else [])]


def call_metadata(adapters: Sequence[AdapterUse]) -> tuple[tuple[str, str], ...]:
    """Returns `x-adapter-id`, a hash of the composition: a balancer may keep an adapter's requests together."""
    parts = sorted(str(use.name or use.digest or use.path or use.id) for use in adapters)
    return (("x-adapter-id", hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]),)

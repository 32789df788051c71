"""The client's TLS options against a true gRPC server, with certificates made here."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lora_client import AsyncLoraClient, LoraClient
from lora_client._channel import Tls
from lora_client.cli.common import Connection
from lora_client.errors import DeadlineExceededError, UnavailableError

NAME = "lora.example"
REFUSED = (UnavailableError, DeadlineExceededError)
"""A failed handshake is UNAVAILABLE, which the client tries again, so that the deadline may come first."""


@dataclass(frozen=True)
class Identity:
    """A private key and its certificate, PEM."""

    key: bytes
    certificate: bytes


def identity(common_name: str, *, loopback: bool = True) -> Identity:
    """Makes a self-signed certificate, for loopback addresses too if asked."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    names: list[x509.GeneralName] = [x509.DNSName(common_name)]
    if loopback:
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Identity(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )


@contextmanager
def serving(server_identity: Identity, trusted_clients: bytes | None = None) -> Iterator[str]:
    """A server of the health service under TLS; with *trusted_clients* it demands a certificate. Yields HOST:PORT."""
    credentials = grpc.ssl_server_credentials(
        [(server_identity.key, server_identity.certificate)], trusted_clients, trusted_clients is not None
    )
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(scope="module")
def own() -> Identity:
    """The server's."""
    return identity(NAME)


def healthy(address: str, tls: Tls | None) -> bool:
    """Asks once, briefly."""
    with LoraClient(address, tls=tls, timeout_s=1) as client:
        return client.health()


def test_a_trusted_server_is_reached(own: Identity) -> None:
    """With the server's certificate as root, calls go through; the asyncio client does the same."""

    async def ask(address: str) -> bool:
        async with AsyncLoraClient(address, tls=Tls(own.certificate), timeout_s=5) as client:
            return await client.health()

    with serving(own) as address:
        assert healthy(address, Tls(own.certificate))
        assert asyncio.run(ask(address))


@pytest.mark.parametrize("case", ["no TLS", "another root", "the system's roots"])
def test_an_untrusted_server_is_refused(own: Identity, case: str) -> None:
    """Nothing is sent to a server that cannot prove who it is, and nothing without TLS to one that wants it."""
    tls = {"no TLS": None, "another root": Tls(identity(NAME).certificate), "the system's roots": Tls()}[case]
    with serving(own) as address, pytest.raises(REFUSED):
        healthy(address, tls)


def test_the_name_in_the_certificate_counts() -> None:
    """A certificate for another name is refused, unless the caller says that it is the name he means."""
    named = identity(NAME, loopback=False)
    with serving(named) as address:
        with pytest.raises(REFUSED):
            healthy(address, Tls(named.certificate))
        assert healthy(address, Tls(named.certificate, server_name=NAME))


def test_mutual_tls_needs_the_clients_certificate(own: Identity) -> None:
    """With it calls go through; without it, or with a stranger's, they do not."""
    mine, stranger = identity("client"), identity("stranger")
    with serving(own, trusted_clients=mine.certificate) as address:
        assert healthy(address, Tls(own.certificate, mine.key, mine.certificate))
        for tls in (Tls(own.certificate), Tls(own.certificate, stranger.key, stranger.certificate)):
            with pytest.raises(REFUSED):
                healthy(address, tls)


def test_the_command_lines_options_reach_the_channel(own: Identity, tmp_path: Path) -> None:
    """--tls-ca, --tls-cert and --tls-key are files of these certificates."""
    mine = identity("client")
    files = {"ca": own.certificate, "cert": mine.certificate, "key": mine.key}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    with serving(own, trusted_clients=mine.certificate) as address, Connection(address, 5, *paths).open() as client:
        assert client.health()

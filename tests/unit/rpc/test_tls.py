"""TLS of a true gRPC server: plain, mutual, and with certificates that change under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_client import AsyncLoraClient, Tls
from lora_client.errors import DeadlineExceededError, UnavailableError
from lora_server.config import ServerConfig, TlsConfig
from lora_server.rpc.probe import NO_CONNECTION, NOT_SERVING, Probe
from lora_server.rpc.server import RpcServer
from lora_server.security.certificates import read_certificates


class Authority:
    """A certificate authority that writes what a server needs."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.root = self.ca.cert_pem.bytes()

    def issue(self, name: str = "localhost") -> TlsConfig:
        """Writes a new certificate and key over the old ones."""
        issued = self.ca.issue_cert(name)
        issued.private_key_pem.write_to_path(self.folder / "key.pem")
        (self.folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return TlsConfig(certificate=self.folder / "cert.pem", private_key=self.folder / "key.pem")

    def client(self, **options: bytes) -> Tls:
        """What a client that trusts this authority uses."""
        return Tls(self.root, server_name="localhost", **options)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority of this test."""
    return Authority(tmp_path)


@asynccontextmanager
async def serving(tls: TlsConfig) -> AsyncIterator[str]:
    """A server that has not loaded its model: health answers, and nothing else."""
    server = RpcServer(ServerConfig(tls=tls, rpc={"listen": "127.0.0.1:0"}))
    try:
        yield await server.start()
    finally:
        await server.stop()


async def can_connect(address: str, tls: Tls | None) -> bool:
    """Whether a client gets an answer."""
    async with AsyncLoraClient(address, tls=tls, timeout_s=1) as client:
        try:
            return not await client.health()
        except (UnavailableError, DeadlineExceededError):  # refused, or refused until the retries ran out of time
            return False


async def test_only_who_trusts_the_authority_and_speaks_tls_gets_in(authority: Authority, tmp_path: Path) -> None:
    """Plain text and strangers' roots fail; the own probe says so with grpc_health_probe's exit codes."""
    async with serving(authority.issue()) as address:
        assert await can_connect(address, authority.client())
        assert not await can_connect(address, None)
        assert not await can_connect(address, Authority(tmp_path).client())
        probe = Probe(address, tls=True, root_certificates=authority.root, server_name="localhost")
        assert await asyncio.to_thread(probe.ask) == (NOT_SERVING, "NOT_SERVING")
        assert (await asyncio.to_thread(Probe(address, timeout_s=0.3).ask))[0] == NO_CONNECTION


async def test_mutual_tls_wants_a_certificate_of_its_authority(authority: Authority, tmp_path: Path) -> None:
    """A client without one, or with another authority's, does not get in."""
    (tmp_path / "ca.pem").write_bytes(authority.root)
    tls = authority.issue().model_copy(update={"client_ca": tmp_path / "ca.pem"})

    def identity(issuer: trustme.CA) -> Tls:
        issued = issuer.issue_cert("me@example.org")
        return authority.client(
            private_key=issued.private_key_pem.bytes(), certificate_chain=issued.cert_chain_pems[0].bytes()
        )

    async with serving(tls) as address:
        assert await can_connect(address, identity(authority.ca))
        assert not await can_connect(address, authority.client())
        assert not await can_connect(address, identity(trustme.CA()))


async def test_new_certificates_are_taken_without_dropping_calls(authority: Authority) -> None:
    """A call that is open stays open; new connections see the new authority; half a change changes nothing."""
    async with serving(authority.issue()) as address:
        old = authority.client()
        channel = grpc.aio.secure_channel(address, old.credentials(), options=old.options())
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

        key = (authority.folder / "key.pem").read_bytes()
        successor = Authority(authority.folder)
        successor.issue()
        new_key = (authority.folder / "key.pem").read_bytes()
        (authority.folder / "key.pem").write_bytes(key)  # the key is yet the old one: no pair
        await asyncio.sleep(0.6)
        assert await can_connect(address, old)
        (authority.folder / "key.pem").write_bytes(new_key)
        await asyncio.sleep(0.6)
        assert await can_connect(address, successor.client())
        assert not await can_connect(address, old)

        assert not watch.done()  # and the old connection still carries calls
        again = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        assert again.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await channel.close()


def test_what_is_no_pair_or_out_of_date_is_refused(authority: Authority, tmp_path: Path) -> None:
    """Another's key, a file that is no PEM, a certificate of yesterday: each said before a server starts."""
    from datetime import UTC, datetime, timedelta

    good = authority.issue()
    read_certificates(good)
    (tmp_path / "other.pem").write_bytes(authority.ca.issue_cert("x").private_key_pem.bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        read_certificates(good.model_copy(update={"private_key": tmp_path / "other.pem"}))
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(ValueError, match="PEM"):
        read_certificates(good.model_copy(update={"client_ca": tmp_path / "none.pem"}))
    with pytest.raises(ValueError, match="PEM"):
        read_certificates(good.model_copy(update={"certificate": tmp_path / "none.pem"}))
    yesterday = authority.ca.issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(days=1))
    (tmp_path / "old.pem").write_bytes(yesterday.private_key_and_cert_chain_pem.bytes())
    with pytest.raises(ValueError, match="expired"):
        read_certificates(TlsConfig(certificate=tmp_path / "old.pem", private_key=tmp_path / "old.pem"))

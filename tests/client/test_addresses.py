"""Addresses in every spelling: the default port, what is on this machine, and that no proxy is asked for it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lora_client import AsyncLoraClient, LoraClient, Tls, addresses
from lora_client.errors import LoraClientError
from lora_server.rpc.probe import SERVING, Probe, reachable

from tests.client.test_client_tls import identity, serving

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.mark.parametrize(
    ("server", "dialled"),
    [
        ("localhost", "localhost:50051"),
        ("localhost:1", "localhost:1"),
        ("localhost.", "localhost:50051"),
        ("example.com", "example.com:50051"),
        ("127.0.0.1", "127.0.0.1:50051"),
        ("127.1:1", "127.0.0.1:1"),
        ("0x7f000001", "127.0.0.1:50051"),
        ("1234.example:1", "1234.example:1"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:1", "[::1]:1"),
        ("dns:localhost", "dns:localhost:50051"),
        ("dns:///localhost:1", "dns:///localhost:1"),
        ("dns://8.8.8.8/example.com", "dns://8.8.8.8/example.com:50051"),
        ("ipv4:127.0.0.1", "ipv4:127.0.0.1:50051"),
        ("ipv4:127.0.0.1:1,127.0.0.2", "ipv4:127.0.0.1:1,127.0.0.2:50051"),
        ("ipv6:[::1]:1", "ipv6:[::1]:1"),
        ("ipv6:%5B::1%5D:1", "ipv6:[::1]:1"),
        ("unix:/run/lora.sock", "unix:/run/lora.sock"),
        ("unix-abstract:lora", "unix-abstract:lora"),
        ("xds:///lora", "xds:///lora"),
    ],
)
def test_the_port_is_50051_unless_it_is_said(server: str, dialled: str) -> None:
    """Never 443, gRPC's own."""
    assert addresses.target(server) == dialled


@pytest.mark.parametrize(
    "server",
    ["", " ", ":50051", "http://localhost:50051", "grpc://a:1", "localhost:0", "localhost:65536", "localhost:http",
     "localhost:", "::1:50051:zz", "[localhost]:1", "a b:1", "a\n:1", "\x1b[31m:1", "localhost:\u0665",
     "localhost:1/x"],
)  # fmt: skip
def test_what_is_no_address_is_said(server: str) -> None:
    """In one line, before anything is dialled."""
    with pytest.raises(ValueError, match="address") as refused:
        addresses.target(server)
    assert str(refused.value).isprintable()


LOOPBACK = [
    "localhost", "LOCALHOST:1", "localhost.:1", "127.0.0.1", "127.9.9.9:1", "127.1:1", "0x7f.0.0.1:1", "2130706433:1",
    "0.0.0.0:1", "::1", "[::1]:1", "[0:0:0:0:0:0:0:1]:1", "[::ffff:127.0.0.1]:1", "::ffff:127.0.0.1", "[::]:1",
    "ipv4:127.0.0.1:1", "ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1", "ipv6:%5B::1%5D:1", "dns:localhost:1",
    "dns:///localhost:1", "dns:///127.0.0.1", "dns://8.8.8.8/localhost:1", "unix:/x", "unix:///x", "unix-abstract:x",
]  # fmt: skip
REMOTE = [
    "10.0.0.1:1", "example.com", "localhost.example.com:1", "127.0.0.1.example.com:1", "128.0.0.1:1", "[2001:db8::1]:1",
    "dns:///example.com:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "[::ffff:10.0.0.1]:1", "xds:///localhost", "1270.0.0.1:1",
]  # fmt: skip


@pytest.mark.parametrize("server", LOOPBACK)
def test_loopback_is_known_in_every_spelling(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes through no proxy."""
    assert addresses.is_local(server)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert addresses.proxy_options(addresses.target(server)) == [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize("server", REMOTE)
def test_a_remote_address_is_left_to_the_proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it looks like; names are not looked up for it."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert not addresses.is_local(server)
    assert addresses.proxy_options(server) == []


@pytest.mark.parametrize(("found", "here"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False)])
def test_this_machines_own_name_counts_if_it_is_loopback(
    found: str, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian's /etc/hosts has it; looked up only where a proxy would be asked."""
    looked_up: list[str] = []

    def getaddrinfo(name: str, _: Any) -> list[Any]:
        looked_up.append(name)
        return [(0, 0, 0, "", (found, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert addresses.proxy_options("box.lan:1") == []
    assert not looked_up
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    assert bool(addresses.proxy_options("box.lan:1")) is here
    assert not addresses.is_local("box.lan:1")  # a token is not sent in plain text to what a resolver says


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A proxy that all variables name; yields what it is asked."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                asked.append(connection.recv(1000))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    for name in PROXIES:
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    yield asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def plain_server() -> Iterator[int]:
    """The health service in plain text on every loopback address; yields its port."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "LocalHost", "localhost.", "ipv4:127.0.0.1", "dns:///localhost"]
)
def test_no_proxy_is_asked_for_a_plain_server_on_loopback(proxy: list[bytes], plain_server: int, host: str) -> None:
    """By the client, the asyncio client, and the probe of `lora-server health`."""

    async def ask(address: str) -> bool:
        async with AsyncLoraClient(address, timeout_s=10) as client:
            return await client.health()

    address = f"{host}:{plain_server}"
    with LoraClient(address, timeout_s=10) as client:
        assert client.health()
    assert asyncio.run(ask(address))
    assert Probe(reachable(address), timeout_s=10).ask()[0] == SERVING
    assert proxy == []


def test_no_proxy_is_asked_for_a_tls_server_on_loopback(proxy: list[bytes]) -> None:
    """With TLS as without."""
    own = identity("localhost")
    with serving(own) as address:
        with LoraClient(address, tls=Tls(own.certificate), timeout_s=10) as client:
            assert client.health()
        probe = Probe(address, timeout_s=10, tls=True, root_certificates=own.certificate)
        assert probe.ask()[0] == SERVING
    assert proxy == []


@pytest.mark.parametrize("tls", [None, Tls()])
def test_a_remote_server_is_reached_through_the_proxy(
    proxy: list[bytes], tls: Tls | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless `no_proxy` names it."""
    with LoraClient("lora.invalid:1", tls=tls, timeout_s=1) as client, pytest.raises(LoraClientError):
        client.health()
    assert proxy[0].startswith(b"CONNECT lora.invalid:1 ")
    assert Probe("lora.invalid:1", timeout_s=1, tls=tls is not None).ask()[0] != SERVING
    assert len(proxy) > 1
    proxy.clear()
    monkeypatch.setenv("no_proxy", "lora.invalid")
    with LoraClient("lora.invalid:1", tls=tls, timeout_s=1) as client, pytest.raises(LoraClientError):
        client.health()
    assert proxy == []

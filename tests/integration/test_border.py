"""Strangers and those who do not read: what one peer can make the server hold, and what it cannot hold up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_api.v1 import server_service_pb2, server_service_pb2_grpc
from lora_client import AsyncLoraClient
from lora_client.errors import UnauthenticatedError, from_rpc_error
from lora_server.config import ServerConfig
from lora_server.rpc import connections, health, wire
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import RpcServer
from lora_server.security.tokens import new_token
from lora_server.types import AdapterInfo, AdapterSource, AdapterState, VersionInfo

from tests.raw_client import RawClient
from tests.unit.monitoring.house import House

WATCH = "/grpc.health.v1.Health/Watch"
LIST = "/lora_api.v1.AdapterService/ListAdapters"
OK, INVALID, EXHAUSTED, UNAUTHENTICATED = "0", "3", "8", "16"
EMPTY = b""


class Library(House):
    """A house whose list of adapters takes almost four MiB, and that counts how often it is asked for."""

    def __init__(self) -> None:
        self.asked = 0
        version = VersionInfo("sha256:0", 1, 1, (), AdapterState.CACHED, None, None, "x" * 4000)
        self._adapters = tuple(
            AdapterInfo(f"a{k:04}", (1,), AdapterSource("/x"), (version,), "sha256:0", None, 1.0) for k in range(900)
        )

    def page(self, _: Any, after: str = "", __: str = "") -> Iterator[AdapterInfo]:
        """Those behind *after*."""
        self.asked += 1
        return (each for each in self._adapters if each.name > after)


@asynccontextmanager
async def serving(house: Any = None, **config: Any) -> AsyncIterator[tuple[RpcServer, str]]:
    """A server in this process that serves a house, and its address."""
    rpc = {"listen": "127.0.0.1:0", **config.pop("rpc", {})}
    server = RpcServer(ServerConfig(rpc=rpc, **config))
    address = await server.start()
    house = house or House()
    await server.serve(Backend(house, house, "1", 0.0, 60.0))
    try:
        yield server, address
    finally:
        await server.stop()


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Any]:
    """The setting of a file of tokens, with one."""
    token, line = new_token(["generate"], "acme")
    (tmp_path / "tokens").write_text(line)
    (tmp_path / "token").write_text(token)
    return {"token_file": tmp_path / "tokens"}


@pytest.fixture
def token(tokens: dict[str, Any], tmp_path: Path) -> str:
    """It."""
    return (tmp_path / "token").read_text()


async def test_a_token_is_asked_for_before_the_request_is_read(tokens: dict[str, Any]) -> None:
    """Forty calls of four MiB, of which nothing but the announcement is sent: all are refused at once."""
    async with serving(auth=tokens) as (_, address):
        client = await RawClient.connect(address)
        for _ in range(40):
            client.send(client.call(), b"x", announced=4 * 2**20, end=False)
        assert await client.statuses(40) == [UNAUTHENTICATED] * 40
        await client.close()


async def test_what_nobody_reads_takes_no_more_than_a_small_window(tokens: dict[str, Any]) -> None:
    """A stranger's watcher has all that it asks for; what it sends beside that is not taken."""
    async with serving(auth=tokens) as (_, address):
        client = await RawClient.connect(address)
        stream = client.call(WATCH)
        client.send(stream, EMPTY, end=False)
        sent = 0
        for _ in range(100):  # as much as the windows allow, again and again
            size = min(client.window(stream), 16_384)
            if size:
                client.http.send_data(stream, b"\0" * size)
                client._flush()
                sent += size
            await asyncio.sleep(0.01)
        assert sent <= 128 * 1024
        await client.close()


async def test_unfinished_requests_are_few_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token, too: newer ones take the place of the oldest, and time ends the last."""
    monkeypatch.setattr(wire, "READ_TIMEOUT_S", 2.0)
    async with serving() as (_, address):
        client = await RawClient.connect(address)
        streams = [client.call() for _ in range(48)]
        for stream in streams:
            client.send(stream, b"x", announced=2**18, end=False)
        displaced = await client.statuses(32)
        assert displaced == [EXHAUSTED] * len(displaced)
        async with AsyncLoraClient(address, timeout_s=5) as honest:
            assert (await honest.server_info()).model["name"] == "demo"
        assert sorted(set(await client.statuses(48))) == [INVALID, EXHAUSTED]
        await client.close()


async def test_unfinished_requests_of_one_tenant_hold_up_no_other(tmp_path: Path) -> None:
    """However many connections one tenant has, full of requests that it never sends whole, another is read at once."""
    (evil, evils), (good, goods) = new_token(["generate"], "evil"), new_token(["generate"], "good")
    (tmp_path / "tokens").write_text(f"{evils}\n{goods}\n")
    async with serving(auth={"token_file": tmp_path / "tokens"}) as (_, address):
        clients = [await RawClient.connect(address) for _ in range(10)]
        for client in clients:
            for _ in range(100):
                client.send(client.call(token=evil), b"x", announced=2**16, end=False)
        await clients[0].statuses(1)  # they have displaced one another: all places are taken
        async with AsyncLoraClient(address, token=good, timeout_s=30) as honest:
            began_s = time.monotonic()
            await honest.server_info()
            assert time.monotonic() - began_s < 2.0
        for client in clients:
            await client.close()


async def test_a_hundred_requests_at_once_are_all_read() -> None:
    """Who sends whole requests is not taken for one who does not, however many there are at a time."""
    async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
        stub: Any = server_service_pb2_grpc.ServerServiceStub(channel)
        request = server_service_pb2.GetServerInfoRequest()
        answers = await asyncio.gather(*[stub.GetServerInfo(request, timeout=20) for _ in range(300)])
        assert all(each.model.name == "demo" for each in answers)


async def test_a_request_that_is_too_large_is_told_so() -> None:
    """By its size, where gRPC has read it; one that gRPC does not take either ends as well."""
    async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(LIST)
        with pytest.raises(grpc.aio.AioRpcError, match="has 600000 bytes; at most"):
            await call(bytes(600_000), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(bytes(4 * 2**20 - 4096), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError, match="is no ListAdaptersRequest"):
            await call(b"\xff", timeout=10)


async def test_unread_answers_are_bounded_and_hold_up_nobody() -> None:
    """A connection that reads nothing is made no more lists than 32 MiB of them; others get theirs meanwhile."""
    library = Library()
    async with serving(library) as (_, address):
        client = await RawClient.connect(address, window=0)
        for _ in range(40):
            client.send(client.call(LIST), b"\x08\xe8\x07")  # a page of a thousand
        await asyncio.sleep(2.0)
        assert 5 <= library.asked <= 12
        async with AsyncLoraClient(address, timeout_s=10) as honest:
            assert len(await honest.adapters.list()) == 900
        await client.close()


async def test_a_connection_whose_answers_nobody_reads_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small answers and large ones, that wait for nothing but their reader; who reads keeps his."""
    monkeypatch.setattr(connections, "SWEEP_S", 0.1)
    async with serving(Library(), rpc={"stalled_reader_timeout_s": 1.0}) as (_, address):
        clients = [await RawClient.connect(address, window=window) for window in (0, 0, 2**23)]
        clients[0].send(clients[0].call("/lora_api.v1.ServerService/GetServerInfo"), EMPTY)
        clients[1].send(clients[1].call(LIST), b"\x08\xe8\x07")
        clients[2].send(clients[2].call("/lora_api.v1.ServerService/GetServerInfo"), EMPTY)
        assert await clients[2].statuses(1) == [OK]
        await clients[0].until_closed()
        await clients[1].until_closed()
        assert not clients[2].closed
        await asyncio.gather(*[client.close() for client in clients])


async def test_watchers_who_do_not_read_hold_up_neither_start_nor_end() -> None:
    """Health is set while they are stuck, others hear of it, and the server stops in its time."""
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0", "drain_timeout_s": 1.0}))
    address = await server.start()
    stuck = [await RawClient.connect(address, window=0) for _ in range(3)]
    for client in stuck:
        client.send(client.call(WATCH), EMPTY)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="lora_api.v1.ServerService")
        watch: Any = stub.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        gone: Any = stub.Watch(request)
        await gone.read()
        gone.cancel()
        house: Any = House()
        await asyncio.wait_for(server.serve(Backend(house, house, "1", 0.0, 60.0)), 2)
        assert (await asyncio.wait_for(watch.read(), 5)).status == health_pb2.HealthCheckResponse.SERVING
        began_s = time.monotonic()
        await asyncio.wait_for(server.drain(), 3)
        assert (await asyncio.wait_for(watch.read(), 5)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.stop()
        assert time.monotonic() - began_s < 10
    await asyncio.gather(*[client.close() for client in stuck])


async def test_watchers_are_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest gives way, a service that is not there is UNKNOWN, and nobody watches for ever."""
    monkeypatch.setattr(health, "_MAX_WATCHERS", 3)
    async with serving() as (server, address), grpc.aio.insecure_channel(address) as channel:
        server._health._max_watch_s = 3.0
        stub = health_pb2_grpc.HealthStub(channel)
        watches: list[Any] = []
        for _ in range(4):
            watches.append(stub.Watch(health_pb2.HealthCheckRequest(service="nothing")))
            assert (await watches[-1].read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(watches[0].read(), 1)
        assert not any(each.done() for each in watches[1:])
        for each in watches[1:]:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(each.read(), 10)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_who_goes_on_without_a_token_loses_the_connection(tokens: dict[str, Any], token: str) -> None:
    """After a bounded number of refusals; a caller with a token, from the same address, and health notice nothing."""
    async with serving(auth=tokens) as (_, address), AsyncLoraClient(address, token=token, timeout_s=10) as honest:
        await honest.server_info()
        answered = []
        for _ in range(3):
            client = await RawClient.connect(address)
            for _ in range(connections.MAX_STREAMS):
                client.send(client.call(), EMPTY)
            await client.until_closed()
            answered.append(len(await client.statuses(0)))
            await client.close()
            assert (await honest.server_info()).model["name"] == "demo"
            assert await honest.health()
        assert max(answered) < 100  # 50, and what leaks while they come


async def test_a_busy_address_is_answered_less(tokens: dict[str, Any], token: str, monkeypatch: Any) -> None:
    """Once strangers have called too much over many connections, each new one gets few answers; health has its own."""
    monkeypatch.setattr(connections, "ADDRESS_CALLS", 60)
    monkeypatch.setattr(connections, "ADDRESS_CALLS_PER_S", 0.0)
    async with serving(auth=tokens) as (_, address):
        answered = []
        for _ in range(4):
            client = await RawClient.connect(address)
            for _ in range(40):
                client.send(client.call(), EMPTY)
            answered.append(len(await client.statuses(40)))
            async with AsyncLoraClient(address, timeout_s=10) as prober:
                assert await prober.health()
            await client.close()
        assert answered[0] == 40
        assert answered[-1] < 30  # 4, and what leaks while they come


async def test_a_connection_with_a_token_is_not_closed_for_strangers_calls(tokens: dict[str, Any], token: str) -> None:
    """It may be a proxy's: they hear TOO_MANY_CALLS, and when to try again."""
    async with serving(auth=tokens) as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/lora_api.v1.ServerService/GetServerInfo")
        await call(b"", metadata=(("authorization", f"Bearer {token}"),))
        for _ in range(connections.STRANGERS_CALLS + 30):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=5)
        error = from_rpc_error(refused.value)
        assert error.reason == "TOO_MANY_CALLS"
        assert error.retry_after_s == 1.0
        await asyncio.sleep(1.5 * connections.HOLD_S)
        await call(b"", metadata=(("authorization", f"Bearer {token}"),))


async def test_methods_that_are_not_there_count_as_well() -> None:
    """On a server without tokens, too."""
    async with serving() as (_, address):
        client = await RawClient.connect(address)
        for _ in range(100):
            client.send(client.call("/no.Service/Method"), EMPTY)
        await client.until_closed(5)
        await client.close()


async def test_idle_connections_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more than there may be: health and a caller get through, and what was known before stays."""
    monkeypatch.setattr(connections, "SWEEP_S", 0.1)
    async with serving(rpc={"max_connections": 16}) as (server, address):
        host, _, port = address.rpartition(":")
        async with AsyncLoraClient(address, timeout_s=10) as honest:
            await honest.server_info()
            idle = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
            await asyncio.sleep(0.5)
            async with AsyncLoraClient(address, timeout_s=10) as newcomer:
                assert await newcomer.health()
                assert (await newcomer.server_info()).model["name"] == "demo"
            assert server._connections.closed
            await honest.server_info()
            for _, writer in idle:
                writer.close()
        for _ in range(50):  # the places of those who have gone are free again
            async with AsyncLoraClient(address, timeout_s=10) as newcomer:
                assert await newcomer.health()


async def test_strangers_who_are_idle_are_let_go(tokens: dict[str, Any], token: str, monkeypatch: Any) -> None:
    """Who has called with a token is not."""
    monkeypatch.setattr(connections, "SWEEP_S", 0.1)
    monkeypatch.setattr(connections, "STRANGERS_IDLE_S", 0.5)
    async with serving(auth=tokens) as (_, address):
        silent, known = await RawClient.connect(address), await RawClient.connect(address)
        known.send(known.call("/lora_api.v1.ServerService/GetServerInfo", token=token), EMPTY)
        await silent.until_closed(5)
        await asyncio.sleep(0.5)
        assert not known.closed
        await asyncio.gather(silent.close(), known.close())


async def test_refusals_reach_asyncio_clients(tokens: dict[str, Any]) -> None:
    """Every one as what it is, for unary calls and streams, though nothing was read."""
    async with serving(auth=tokens) as (_, address), AsyncLoraClient(address, token="x", timeout_s=10) as client:
        for _ in range(20):
            with pytest.raises(UnauthenticatedError):
                await client.server_info()
            with pytest.raises(UnauthenticatedError):
                await client.generate("x")

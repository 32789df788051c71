"""What benchmarks.hostile does at length, in small: the server outlives clients that do harm, and lets go of them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_api.v1 import generation_service_pb2, generation_service_pb2_grpc
from lora_client import GenerationOptions, LoraClient
from lora_client.errors import from_rpc_error
from lora_server.config import ServerConfig
from lora_server.rpc import server as rpc_server
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import RpcServer
from lora_server.types import EncodedImage, GenerationEvent, ImageEvent, ImageFormat, Provenance

from tests.unit.monitoring.house import House


def test_cancelled_calls_leave_a_server_that_serves(server_address: str) -> None:
    """Four hundred calls, cancelled at any moment of theirs: no crash, no lease, nothing that waits or runs."""

    async def cancel_many() -> None:
        async with grpc.aio.insecure_channel(server_address) as channel:
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            spec = generation_service_pb2.GenerationSpec(prompt="x", num_inference_steps=100)

            async def caller(count: int) -> None:
                for k in range(count):
                    call = stub.StreamGenerate(generation_service_pb2.StreamGenerateRequest(spec=spec))
                    if k % 2:
                        await call.read()
                    else:
                        await asyncio.sleep(0.002 * (k % 7))
                    call.cancel()

            await asyncio.gather(*[caller(20) for _ in range(20)])

    asyncio.run(cancel_many())
    with LoraClient(server_address, timeout_s=30) as client:
        deadline_s = time.monotonic() + 10
        while True:
            info = client.server_info()
            if not (info.queue["running_requests"] or info.queue["queued_requests"] or info.cache["leases"]):
                break
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert client.generate("x", options=GenerationOptions(num_inference_steps=1)).images


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def serves_another(address: str) -> None:
    """A client that means well, with a connection of its own, gets an image; and nothing is held once it has it."""

    def ask() -> None:
        with LoraClient(address, timeout_s=10) as client:
            assert client.generate("x", adapters=["neon"], options=GenerationOptions(num_inference_steps=1)).images
            deadline_s = time.monotonic() + 5
            while client.server_info().cache["leases"]:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)

    await asyncio.to_thread(ask)


async def test_a_hundred_idle_streams_hold_up_nobody(server_address: str) -> None:
    """Health.Watch streams over ten connections, all open before and after somebody else's request."""
    channels = [
        grpc.aio.insecure_channel(server_address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(10)
    ]
    try:
        calls: list[Any] = [
            health_pb2_grpc.HealthStub(channels[k % 10]).Watch(health_pb2.HealthCheckRequest()) for k in range(100)
        ]
        first = await asyncio.wait_for(asyncio.gather(*[call.read() for call in calls]), 10)
        assert {each.status for each in first} == {health_pb2.HealthCheckResponse.SERVING}
        await serves_another(server_address)
        assert not any(call.done() for call in calls)
    finally:
        await asyncio.gather(*[channel.close() for channel in channels])
    await serves_another(server_address)


async def test_connections_that_trickle_hold_up_nobody(server_address: str) -> None:
    """Twenty that send HTTP/2's preface byte by byte, and never all of it."""
    host, port = server_address.split(":")
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(20)]

    async def trickle() -> None:
        for k in range(len(PREFACE) - 1):
            for _, writer in connections:
                writer.write(PREFACE[k : k + 1])
            await asyncio.sleep(0.1)

    trickling = asyncio.create_task(trickle())
    try:
        await asyncio.sleep(0.2)
        await serves_another(server_address)
        assert not trickling.done(), "they had nothing left to say"
        assert not any(reader.at_eof() for reader, _ in connections)
    finally:
        trickling.cancel()
        for _, writer in connections:
            writer.close()
    await serves_another(server_address)


def shorten(monkeypatch: pytest.MonkeyPatch, **options: int) -> None:
    """Gives a server of this process other values for *options* that it sets already."""
    set_already = dict(rpc_server._OPTIONS)
    wanted = {f"grpc.{name}".replace("http2_", "http2."): value for name, value in options.items()}
    assert wanted.keys() <= set_already.keys()
    monkeypatch.setattr(rpc_server, "_OPTIONS", list({**set_already, **wanted}.items()))


async def test_a_connection_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the handshake's time (ten seconds, here one), though it is never silent."""
    shorten(monkeypatch, server_handshake_timeout_ms=1000)
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0"}))
    host, port = (await server.start()).split(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        began_s = time.monotonic()
        ended = asyncio.create_task(reader.read())
        for k in range(len(PREFACE) - 1):
            await asyncio.wait([ended], timeout=0.2)
            if ended.done():
                break
            writer.write(PREFACE[k : k + 1])
        assert ended.done()
        assert 0.8 < time.monotonic() - began_s < 4
        writer.close()
    finally:
        await server.stop()


@contextmanager
def client_process(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that begins a request and waits for its images."""
    code = "import sys; from lora_client import LoraClient\nlist(LoraClient(sys.argv[1]).stream_generate('x'))"
    process = subprocess.Popen([sys.executable, "-c", code, address], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_client_that_hangs_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped: it answers no ping, and its job is closed; one that only waits keeps its own."""
    shorten(monkeypatch, keepalive_time_ms=500, keepalive_timeout_ms=500, http2_ping_timeout_ms=500)
    engine: Any = EndlessEngine(silent=True)
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0"}))
    address = await server.start()
    await server.serve(Backend(engine, engine, "1", 0.0, 60.0))
    try:
        with client_process(address) as hung, client_process(address):
            await until(lambda: len(engine.jobs) == 2)
            await asyncio.sleep(1.5)  # more than a ping and its time
            assert not any(job.closed for job in engine.jobs)
            hung.send_signal(signal.SIGSTOP)
            await until(lambda: any(job.closed for job in engine.jobs))
            await asyncio.sleep(1.0)
            assert sum(job.closed for job in engine.jobs) == 1
    finally:
        await server.stop()


async def until(condition: Any, timeout_s: float = 15.0) -> None:
    """Waits until *condition* holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)


async def read_to_the_end(call: Any) -> None:
    """Takes all that is left."""
    while await call.read() is not grpc.aio.EOF:
        pass


class EndlessJob:
    """A job that has one more large image whenever it is asked, or never anything."""

    def __init__(self, request: Any, silent: bool) -> None:
        self.request = request
        self.silent = silent
        self.closed = False
        self.finished = False

    def subscribe(self, wake: Any) -> EndlessJob:
        """Joins it."""
        return self

    def poll(self) -> list[GenerationEvent]:
        """One more image."""
        if self.silent:
            return []
        provenance = Provenance("m", "p", "", 0, 1, 1.0, 8, 8, (), "s")
        return [ImageEvent(EncodedImage(0, ImageFormat.PNG, bytes(2**20), "0" * 64, provenance))]

    def close(self) -> None:
        """Leaves it."""
        self.closed = True


class EndlessEngine(House):
    """An engine of such jobs."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.jobs: list[EndlessJob] = []

    def submit(self, request: Any) -> EndlessJob:
        """Begins one."""
        self.jobs.append(EndlessJob(request, self.silent))
        return self.jobs[-1]


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """The stream is ended and its job let go of once nothing was taken for the configured time, and not before."""
    engine: Any = EndlessEngine()
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0", "stalled_reader_timeout_s": 2.0}))
    address = await server.start()
    await server.serve(Backend(engine, engine, "1", 0.0, 60.0))
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            spec = generation_service_pb2.GenerationSpec(prompt="x")
            call = stub.StreamGenerate(generation_service_pb2.StreamGenerateRequest(spec=spec))
            for _ in range(12):  # a slow reader, but one
                await call.read()
                await asyncio.sleep(0.2)
            assert not engine.jobs[0].closed
            deadline_s = time.monotonic() + 10
            while not engine.jobs[0].closed:
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(read_to_the_end(call), 10)
            assert from_rpc_error(ended.value).reason == "READER_STALLED"
    finally:
        await server.stop()

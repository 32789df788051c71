"""What benchmarks.hostile does at length, in small: the server outlives clients that do harm, and lets go of them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from lora_api.v1 import generation_service_pb2, generation_service_pb2_grpc
from lora_client import GenerationOptions, LoraClient
from lora_client.errors import from_rpc_error
from lora_server.config import ServerConfig
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import RpcServer
from lora_server.types import EncodedImage, GenerationEvent, ImageEvent, ImageFormat, Provenance

from tests.unit.monitoring.house import House


def test_cancelled_calls_leave_a_server_that_serves(server_address: str) -> None:
    """Four hundred calls, cancelled at any moment of theirs: no crash, no lease, nothing that waits or runs."""

    async def cancel_many() -> None:
        async with grpc.aio.insecure_channel(server_address) as channel:
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            spec = generation_service_pb2.GenerationSpec(prompt="x", num_inference_steps=500)

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


async def read_to_the_end(call: Any) -> None:
    """Takes all that is left."""
    while await call.read() is not grpc.aio.EOF:
        pass


class EndlessJob:
    """A job that has one more large image whenever it is asked."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.closed = False
        self.finished = False

    def subscribe(self, wake: Any) -> EndlessJob:
        """Joins it."""
        return self

    def poll(self) -> list[GenerationEvent]:
        """One more image."""
        provenance = Provenance("m", "p", "", 0, 1, 1.0, 8, 8, (), "s")
        return [ImageEvent(EncodedImage(0, ImageFormat.PNG, bytes(2**20), "0" * 64, provenance))]

    def close(self) -> None:
        """Leaves it."""
        self.closed = True


class EndlessEngine(House):
    """An engine of such jobs."""

    def __init__(self) -> None:
        self.jobs: list[EndlessJob] = []

    def submit(self, request: Any) -> EndlessJob:
        """Begins one."""
        self.jobs.append(EndlessJob(request))
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

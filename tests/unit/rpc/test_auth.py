"""The interceptor on a true gRPC server, in plain text on loopback: who gets past it, for every kind of method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lora_client import AsyncLoraClient
from lora_client.errors import PermissionDeniedError, ServerNotReadyError, UnauthenticatedError
from lora_server.config import ServerConfig
from lora_server.observer import SilentObserver
from lora_server.rpc.server import RpcServer
from lora_server.security.tokens import new_token


@pytest.fixture
def token(tmp_path: Path) -> str:
    """A token that may generate, in a file `tokens`."""
    made, line = new_token(["generate"], "acme")
    (tmp_path / "tokens").write_text(line)
    return made


@pytest.fixture
async def address(tmp_path: Path, token: str) -> AsyncIterator[str]:
    """A server that has not loaded its model: who is let in hears SERVER_NOT_READY."""
    server = RpcServer(ServerConfig(rpc={"listen": "127.0.0.1:0"}, auth={"token_file": tmp_path / "tokens"}))
    yield await server.start()
    await server.stop()


async def test_a_known_token_gets_past_and_others_do_not(address: str, token: str) -> None:
    """Unary and streaming calls alike; health needs none."""
    for given in ("lora_x", None):
        async with AsyncLoraClient(address, token=given, timeout_s=10) as client:
            assert not await client.health()
            with pytest.raises(UnauthenticatedError):
                await client.server_info()
            with pytest.raises(UnauthenticatedError):
                await client.generate("x")
    async with AsyncLoraClient(address, token=token, timeout_s=10) as client:
        with pytest.raises(ServerNotReadyError):
            await client.generate("x")
        with pytest.raises(PermissionDeniedError):
            await client.adapters.load("/x")


async def test_reflection_takes_a_token(address: str, token: str) -> None:
    """Nobody looks around from outside; a method that streams both ways is refused like any other."""

    def ask(metadata: tuple[tuple[str, str], ...]) -> object:
        # Not the asyncio client: it says INTERNAL, once in some hundred calls, if it is refused before it has written.
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            return next(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10))

    assert await asyncio.to_thread(ask, (("authorization", f"Bearer {token}"),))
    with pytest.raises(grpc.RpcError) as refused:
        await asyncio.to_thread(ask, ())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_method_that_is_not_there_says_so(address: str) -> None:
    """UNIMPLEMENTED, as without tokens."""
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as unknown:
            await channel.unary_unary("/lora_api.v1.GenerationService/Nothing")(b"")
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_refused_calls_are_told(tmp_path: Path, token: str) -> None:
    """They never get to the border, and are counted all the same, by the border's names."""
    told: list[tuple[str, str, str]] = []

    class Listener(SilentObserver):
        def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
            told.append((method, code, reason))

    config = ServerConfig(rpc={"listen": "127.0.0.1:0"}, auth={"token_file": tmp_path / "tokens"})
    server = RpcServer(config, Listener())
    async with AsyncLoraClient(await server.start(), timeout_s=10) as client:
        with pytest.raises(UnauthenticatedError):
            await client.generate("x")
    await server.stop()
    assert told == [("stream_generate", "UNAUTHENTICATED", "UNAUTHENTICATED")]

"""The client comes back when the server says, with the same id, within its time; the server of these tests is ours."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from lora_api.v1 import generation_service_pb2, generation_service_pb2_grpc
from lora_client import AsyncLoraClient, GenerationOptions, LoraClient, RetryPolicy
from lora_client._retry import Attempts
from lora_client.errors import LoraClientError, QueueFullError
from lora_client.types import Completed, Queued

from tests.conftest import BIN

PAUSE_S = 0.3


def full(retry_s: float | None) -> status_pb2.Status:
    """What a server with a full queue answers."""
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="lora-inference")
    details = [info]
    if retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_s * 1e9))
        details.append(retry)
    packed = [any_pb2.Any() for _ in details]
    for each, detail in zip(packed, details, strict=True):
        each.Pack(detail)
    return status_pb2.Status(code=8, message="The queue is full.", details=packed)


class Busy(generation_service_pb2_grpc.GenerationServiceServicer):
    """Has no room for the first so many calls."""

    def __init__(self) -> None:
        self.refusals = 0
        self.retry_s: float | None = PAUSE_S
        self.calls: list[tuple[float, str, float | None]] = []

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[Any]:
        """Refuses, or makes nothing at once."""
        self.calls.append((time.monotonic(), request.request_id, context.time_remaining()))
        if len(self.calls) <= self.refusals:
            context.abort_with_status(rpc_status.to_status(full(self.retry_s)))
        queued = generation_service_pb2.Queued(request_id=request.request_id)
        queued.expected_time.FromNanoseconds(1_500_000_000)
        yield generation_service_pb2.StreamGenerateResponse(queued=queued)
        stats = generation_service_pb2.GenerationStats(request_id=request.request_id)
        yield generation_service_pb2.StreamGenerateResponse(stats=stats)


@pytest.fixture
def busy() -> Iterator[tuple[str, Busy]]:
    """(its address, the server)."""
    server, found = grpc.server(futures.ThreadPoolExecutor(4)), Busy()
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(found, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", found
    server.stop(None)


def test_a_refused_request_is_sent_again_when_the_server_says(busy: tuple[str, Busy]) -> None:
    """With the same id, not before the time, and whoever listens is told; then its events come once."""
    address, server = busy
    server.refusals = 2
    told: list[tuple[float, LoraClientError]] = []
    with LoraClient(address, retry=RetryPolicy(on_wait=lambda s, error: told.append((s, error)))) as client:
        events = list(client.stream_generate("x"))
    assert [type(event) for event in events] == [Queued, Completed]
    assert isinstance(events[0], Queued)
    assert events[0].expected_time_s == 1.5
    assert len({name for _, name, _ in server.calls}) == 1
    assert server.calls[0][1]
    gaps = [later[0] - earlier[0] for earlier, later in zip(server.calls, server.calls[1:], strict=False)]
    assert all(gap >= PAUSE_S for gap in gaps)
    assert [PAUSE_S <= seconds <= 1.1 * PAUSE_S for seconds, _ in told] == [True, True]
    assert {error.reason for _, error in told} == {"QUEUE_FULL"}


async def test_the_asyncio_client_does_the_same(busy: tuple[str, Busy]) -> None:
    """And leaves the loop free while it waits."""
    address, server = busy
    server.refusals = 2
    async with AsyncLoraClient(address) as client:
        await client.generate("x", options=GenerationOptions(request_id="mine"))
    assert [name for _, name, _ in server.calls] == ["mine"] * 3
    assert server.calls[2][0] - server.calls[0][0] >= 2 * PAUSE_S


@pytest.mark.parametrize(
    ("policy", "timeout_s", "retry_s", "calls"),
    [
        (RetryPolicy(max_attempts=1), None, PAUSE_S, 1),
        (RetryPolicy(max_attempts=3), None, PAUSE_S, 3),
        (RetryPolicy(max_wait_s=0.1), None, PAUSE_S, 1),
        (RetryPolicy(), 0.2, PAUSE_S, 1),
        (RetryPolicy(), None, None, 1),
    ],
    ids=["off", "attempts", "a wait too long", "no time for the wait", "no RetryInfo"],
)
def test_there_is_an_end_to_it(
    busy: tuple[str, Busy], policy: RetryPolicy, timeout_s: float | None, retry_s: float | None, calls: int
) -> None:
    """The server's answer is the error, and nobody waits for nothing."""
    address, server = busy
    server.refusals, server.retry_s = 99, retry_s
    began_s = time.monotonic()
    with LoraClient(address, retry=policy, timeout_s=timeout_s) as client, pytest.raises(QueueFullError):
        client.generate("x")
    assert len(server.calls) == calls
    assert calls > 1 or time.monotonic() - began_s < PAUSE_S + 5


def test_all_attempts_share_the_timeout(busy: tuple[str, Busy]) -> None:
    """The deadline of the last call is what the first ones and the waits have left."""
    address, server = busy
    server.refusals = 1
    with LoraClient(address, timeout_s=5) as client:
        client.generate("x")
    first, second = (remaining for _, _, remaining in server.calls)
    assert first is not None
    assert second is not None
    assert second <= first - PAUSE_S + 0.05


def test_no_attempts_are_no_policy() -> None:
    """Zero is refused in one sentence; the waits of one error differ."""
    with pytest.raises(ValueError, match="at least 1"):
        RetryPolicy(max_attempts=0)
    error = QueueFullError("full", retry_after_s=10.0)
    assert len({Attempts(RetryPolicy(), None).wait_s(error) for _ in range(5)}) > 1


def test_the_command_waits_and_says_so(busy: tuple[str, Busy], tmp_path: Path) -> None:
    """By default; with one attempt it ends with the code of what is exhausted, and at once."""
    address, server = busy
    server.refusals = 2
    command = [BIN / "lora-client", "--server", address, "generate", "--prompt", "x", "--output", tmp_path / "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("trying again in 0.3 s")) == (0, 2)
    server.calls.clear()
    once = subprocess.run([*command, "--max-attempts", "1"], capture_output=True, text=True, check=False, timeout=60)
    assert (once.returncode, len(server.calls)) == (6, 1)
    assert "QUEUE_FULL" in once.stderr

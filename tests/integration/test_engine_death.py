"""A true server process whose engine dies: once it goes on; twice in a minute it is NOT_SERVING and exits with 1."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_client import GenerationOptions, LoraClient, Progress
from lora_client.errors import EngineFailureError, LoraClientError, UnavailableError

from tests.integration.dying_server import DEADLY

QUICK = GenerationOptions(num_inference_steps=2)
GONE_WITHIN_S = 10.0
"""From the second death to the end of the process: a second of grace for calls, and the engine's own end."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """The process, its address and its log."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.integration.dying_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--warm-size", "64x64"]  # a quicker start
    with open(log, "w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield process, line.split()[-1], log
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def watch(channel: grpc.Channel, statuses: queue.Queue[Any]) -> None:
    """Puts every status of Health.Watch into *statuses*, and None at the stream's end."""
    try:
        for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            statuses.put(response.status)
    except grpc.RpcError:
        pass
    statuses.put(None)


def test_an_engine_that_dies_twice_in_a_minute_takes_the_process_with_it(
    server: tuple[subprocess.Popen[str], str, Path],
) -> None:
    """The first death costs its request only; after the second, watchers hear NOT_SERVING, and the exit code is 1."""
    process, address, log = server
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    statuses: queue.Queue[Any] = queue.Queue()
    others: list[BaseException] = []
    begun = threading.Event()

    def draw_for_long() -> None:
        try:
            for event in client.stream_generate("x", options=GenerationOptions(num_inference_steps=500)):
                if isinstance(event, Progress):
                    begun.set()
        except LoraClientError as error:
            others.append(error)

    with grpc.insecure_channel(address) as channel, LoraClient(address, timeout_s=60) as client:
        watching = threading.Thread(target=watch, args=(channel, statuses))
        watching.start()
        assert statuses.get(timeout=10) == serving
        before = client.generate("x", seed=1, options=QUICK).images[0].data
        with pytest.raises(EngineFailureError):
            client.generate(DEADLY, options=QUICK)
        assert client.generate("x", seed=1, options=QUICK).images[0].data == before
        assert client.health()
        assert client.server_info().engine["restarts"] == 1
        beside = threading.Thread(target=draw_for_long)
        beside.start()
        assert begun.wait(30)
        with pytest.raises((EngineFailureError, UnavailableError)):
            client.generate(DEADLY, options=QUICK)
        died_s = time.monotonic()
        assert statuses.get(timeout=10) == not_serving
        assert process.wait(GONE_WITHIN_S) == 1
        assert time.monotonic() - died_s < GONE_WITHIN_S
        assert statuses.get(timeout=10) is None
        watching.join(10)
        beside.join(10)
        assert [type(error) for error in others] == [EngineFailureError]
    assert "the engine died and is not restarted" in log.read_text()

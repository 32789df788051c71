"""Start, drain and stop of a true process, on a Unix socket: what health says when, and the exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_api.v1 import server_service_pb2, server_service_pb2_grpc
from lora_client import GenerationOptions, LoraClient, Progress
from lora_client.errors import LoraClientError, ServerDrainingError, from_rpc_error

from tests.conftest import BIN

LONG = GenerationOptions(num_inference_steps=200)
SERVICES = ["", *(f"lora_api.v1.{name}Service" for name in ("Generation", "Adapter", "Server"))]


class Running:
    """A server process and a bare channel to it, without the client's retries."""

    def __init__(self, folder: Path, *flags: str | Path) -> None:
        self.socket = folder / "s.sock"
        self.address = f"unix:{self.socket}"
        command = [BIN / "lora-server", "serve", "--listen", self.address, *flags]
        environment = {**os.environ, "LORA_SERVER_ENGINE_WARM_UP_S": "0"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.channel = grpc.insecure_channel(self.address)

    def wait_listening(self) -> None:
        """Waits until the socket is there, long before the model is."""
        deadline_s = time.monotonic() + 60
        while not self.socket.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def wait_serving(self) -> None:
        """Waits for the line on standard output."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def reason(self) -> str:
        """Why a new call is refused."""
        stub = server_service_pb2_grpc.ServerServiceStub(self.channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.GetServerInfo(server_service_pb2.GetServerInfoRequest(), timeout=10)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        return from_rpc_error(error.value).reason

    def watch(self, service: str) -> Iterator[str]:
        """The states of a service, as they come."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        with contextlib.suppress(grpc.RpcError):
            for response in stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60):
                yield health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def generate(self) -> tuple[threading.Thread, list[object]]:
        """Starts a long request; returns when its first step is done. The list gets its end: a result or an error."""
        ends: list[object] = []
        stepping = threading.Event()

        def run() -> None:
            with LoraClient(self.address) as client:
                try:
                    for event in client.stream_generate("a red star", options=LONG):
                        if isinstance(event, Progress):
                            stepping.set()
                    ends.append("completed")
                except LoraClientError as error:
                    ends.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert stepping.wait(30)
        return thread, ends

    def wait_end(self, timeout_s: float) -> int:
        """Waits for the process's end; returns its exit code."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Leaves nothing behind."""
        self.channel.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Starts servers that end with the test."""
    started: list[Running] = []

    def begin(*flags: str | Path) -> Running:
        started.append(Running(tmp_path, *flags))
        return started[-1]

    yield begin
    for each in started:
        each.close()


def test_a_life_from_start_to_the_end_of_the_last_request(start: object, demo_adapters: Path, tmp_path: Path) -> None:
    """NOT_SERVING until preloads and pins are there; at SIGTERM no new call, the running one ends, exit code 0."""
    config = tmp_path / "server.toml"
    config.write_text(f'preloads = [{{ path = "{demo_adapters / "a"}", name = "kept", pin = "device" }}]')
    server: Running = start("--config", config)  # type: ignore[operator]
    server.wait_listening()
    states = {service: server.watch(service) for service in SERVICES}
    assert {service: next(each) for service, each in states.items()} == dict.fromkeys(SERVICES, "NOT_SERVING")
    assert server.reason() == "SERVER_NOT_READY"
    assert health_exit_code(server) == 4

    assert {next(each) for each in states.values()} == {"SERVING"}
    with LoraClient(server.address) as client:
        kept = client.adapters.get("kept")
        assert kept.pin is not None
        assert kept.current.state == "resident"
    assert health_exit_code(server) == 0

    thread, ends = server.generate()
    server.process.send_signal(signal.SIGTERM)
    assert {next(each) for each in states.values()} == {"NOT_SERVING"}
    assert server.reason() == "SERVER_DRAINING"
    assert thread.is_alive()
    assert server.wait_end(60) == 0
    thread.join(10)
    assert ends == ["completed"]
    assert not server.socket.exists()
    assert health_exit_code(server) == 2


def health_exit_code(server: Running) -> int:
    """What `lora-server health` ends with."""
    command = [BIN / "lora-server", "health", "--address", server.address, "--timeout", "0.5"]
    return subprocess.run(command, capture_output=True).returncode


def test_what_outlives_the_drain_timeout_is_ended(start: object) -> None:
    """The request gets SERVER_DRAINING, which a client may retry elsewhere; the server ends with 0 all the same."""
    server: Running = start("--drain-timeout", "0.2")  # type: ignore[operator]
    server.wait_serving()
    thread, ends = server.generate()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_end(10) == 0
    thread.join(10)
    assert isinstance(ends[0], ServerDrainingError)


def test_a_second_sigint_ends_at_once(start: object) -> None:
    """The drain timeout, half a minute by default, is not waited for."""
    server: Running = start()  # type: ignore[operator]
    server.wait_serving()
    thread, ends = server.generate()
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert server.process.poll() is None
    began_s = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_end(10) == 0
    assert time.monotonic() - began_s < 5
    thread.join(10)
    assert isinstance(ends[0], ServerDrainingError)

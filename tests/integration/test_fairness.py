"""A true server between tenants: nobody holds the others up, or the memory that they need."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from lora_api.v1 import generation_service_pb2
from lora_client import GenerationOptions, LoraClient, RetryPolicy
from lora_client.errors import QueueFullError
from lora_client.types import Event, Progress
from lora_server.security.tokens import new_token

from tests.conftest import BIN

QUICK = GenerationOptions(num_inference_steps=4, width_px=64, height_px=64)
HUGE = GenerationOptions(num_inference_steps=500, num_images=16, width_px=128, height_px=128)
STARTS_S = 60.0
"""Far more than a small request takes, and far less than a huge one."""


@dataclass(frozen=True)
class Server:
    """Where it is, and the tokens of its tenants."""

    address: str
    tokens: dict[str, str]

    def client(self, tenant: str | None, timeout_s: float | None = None) -> LoraClient:
        """A client of a tenant, which takes the first answer."""
        token = self.tokens[tenant] if tenant else None
        return LoraClient(self.address, token=token, timeout_s=timeout_s, retry=RetryPolicy(max_attempts=1))


@contextmanager
def serving(folder: Path, *tenants: str, **settings: object) -> Iterator[Server]:
    """A server with a token for each tenant, or without tokens."""
    made = {tenant: new_token(["admin", "generate"], tenant) for tenant in tenants}
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0"]
    if tenants:
        (folder / "tokens").write_text("\n".join(line for _, line in made.values()))
        command += ["--token-file", folder / "tokens"]
    environment = {**os.environ, "LORA_SERVER_ENGINE_WARM_SIZES": "[]"}
    environment |= {f"LORA_SERVER_ENGINE_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the server did not start"
        yield Server(line.split()[-1], {tenant: token for tenant, (token, _) in made.items()})
    finally:
        process.terminate()
        code = process.wait(timeout=40)
        process.stdout.close()
        assert code == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With three tenants and a short queue; little may be unread."""
    folder = tmp_path_factory.mktemp("fairness")
    settings = {"max_queued_requests": 8, "max_expected_wait_s": 100_000, "max_unread_bytes": 8_000}
    with serving(folder, "evil", "good", "third", **settings) as found:
        yield found


def begin(client: LoraClient, options: GenerationOptions) -> Iterator[Event]:
    """Asks for images, and returns when a step of them is done, or the request waits."""
    events = client.stream_generate("a star", options=options)
    next(events)
    return events


def until_steps(events: Iterator[Event]) -> Progress:
    return next(event for event in events if isinstance(event, Progress))


def eventually(client: LoraClient, **wanted: int) -> None:
    """Waits until the queue says so."""
    deadline_s = time.monotonic() + STARTS_S
    while (queue := client.server_info().queue) and any(queue[name] != value for name, value in wanted.items()):
        assert time.monotonic() < deadline_s, (queue, wanted)
        time.sleep(0.05)


def test_a_small_request_is_not_held_up_by_a_huge_one_of_another_tenant(server: Server) -> None:
    """Of 8,000 steps a small part is done when it has its picture; and it is the same picture."""
    with server.client("evil") as evil, server.client("good") as good:
        alone = good.generate("x", seed=1, options=QUICK).images[0].data
        huge = begin(evil, HUGE)
        until_steps(huge)
        assert good.generate("x", seed=1, options=QUICK).images[0].data == alone
        assert until_steps(huge).completed_steps < 4_000
        huge.close()  # type: ignore[attr-defined]
        eventually(good, running_requests=0, unread_bytes=0)


def test_a_small_request_is_not_held_up_by_a_huge_one_where_nobody_has_a_token(tmp_path: Path) -> None:
    """All callers are one tenant: its requests take turns, and there are places for the small."""
    with serving(tmp_path, max_expected_wait_s=100_000) as server, server.client(None) as client:
        huge = [begin(client, HUGE) for _ in range(4)]
        until_steps(huge[0])
        client.generate("x", options=QUICK)
        assert until_steps(huge[0]).completed_steps < 4_000
        for each in huge:
            each.close()  # type: ignore[attr-defined]


def test_one_tenant_cannot_fill_the_queue_nor_two_together(server: Server) -> None:
    """It has its share of the places; others are let in, served, and refused by nobody's fault but their own."""
    with server.client("evil") as evil, server.client("good") as good, server.client("third") as third:
        calls = [begin(evil, HUGE), begin(evil, HUGE)]  # these take its places among the active images
        eventually(good, running_requests=2)
        calls += [begin(evil, HUGE) for _ in range(6)]
        with pytest.raises(QueueFullError) as full:
            begin(evil, QUICK)
        assert full.value.metadata["max_queued_per_tenant"] == "6"
        good.generate("x", options=QUICK)
        third.generate("x", options=QUICK)
        for call in calls:
            call.close()  # type: ignore[attr-defined]
        eventually(good, running_requests=0, queued_requests=0, unread_bytes=0)


def test_a_deadline_that_the_queue_lets_pass_is_told_at_once(server: Server) -> None:
    """Not after it has passed: with the wait that is expected, and when to come back."""
    with server.client("evil") as evil, server.client("evil", timeout_s=5) as hasty:
        huge = begin(evil, HUGE)
        until_steps(huge)
        began_s = time.monotonic()
        with pytest.raises(QueueFullError) as full:
            hasty.generate("y", options=HUGE)
        assert time.monotonic() - began_s < 4
        assert float(full.value.metadata["expected_wait_s"]) > float(full.value.metadata["max_wait_s"])
        assert full.value.retry_after_s is not None
        huge.close()  # type: ignore[attr-defined]
        eventually(evil, running_requests=0)


def literal(name: str, value: str) -> bytes:
    """A header of HTTP/2, not compressed."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def unread_unary_call(address: str, token: str) -> socket.socket:
    """Calls Generate with a flow-control window of 0: its response is never taken."""
    host, port = address.split(":")
    headers = {
        ":method": "POST", ":scheme": "http", ":path": "/lora_api.v1.GenerationService/Generate",
        ":authority": "localhost", "te": "trailers", "content-type": "application/grpc",
        "authorization": f"Bearer {token}",
    }  # fmt: skip
    spec = generation_service_pb2.GenerationSpec(prompt="x", num_inference_steps=4, width_px=64, height_px=64)
    body = generation_service_pb2.GenerateRequest(spec=spec).SerializeToString()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, 0, struct.pack(">HI", 4, 0))
        + frame(1, 4, 1, b"".join(literal(*each) for each in headers.items()))
        + frame(0, 1, 1, b"\0" + struct.pack(">I", len(body)) + body)
    )
    return connection


def test_unread_responses_count_against_their_tenant_until_the_call_ends(server: Server) -> None:
    """Who takes none of its responses gets no more; others do. With its connection, all is given back."""
    with server.client("evil") as evil, server.client("good") as good:
        connections = []
        try:
            held = 0
            while held < 6_000 and len(connections) < 10:
                connections.append(unread_unary_call(server.address, server.tokens["evil"]))
                before, deadline_s = held, time.monotonic() + STARTS_S
                while (held := good.server_info().queue["unread_bytes"]) <= before:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.05)
            with pytest.raises(QueueFullError) as full:
                evil.generate("x", options=QUICK)
            assert int(full.value.metadata["unread_bytes"]) >= 6_000
            good.generate("x", options=QUICK)
        finally:
            for connection in connections:
                connection.close()
        eventually(good, unread_bytes=0, running_requests=0)
        evil.generate("x", options=QUICK)

"""A true server that is watched from all sides: metrics, log, traces, WatchServer, and a full queue."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from lora_client import GenerationOptions, LoraClient, RetryPolicy
from lora_client.errors import QueueFullError

from tests.conftest import BIN

trace_service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

PROMPT = "a red star that nobody may read of"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
QUICK = GenerationOptions(num_inference_steps=3)


@dataclass
class Collector:
    """What an OTLP collector has got."""

    spans: list[Any] = field(default_factory=list)

    def export(self, request: Any, context: Any) -> Any:
        """Keeps the spans."""
        self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True)
class Watched:
    """A server, and where its outputs go."""

    address: str
    metrics: str
    log: Path
    collector: Collector

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def request_lines(self, request_id: str) -> list[dict[str, Any]]:
        """The lines of one request."""
        return [line for line in self.lines() if line.get("request_id") == request_id]

    def metric(self, sample: str) -> float:
        """One sample, by its whole name."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{sample} "):
                    return float(line.split()[-1])
        return 0.0


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, Collector]]:
    """A collector of traces: (its URL, what it gets)."""
    found = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(
        found.export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", found
    server.stop(0)


@pytest.fixture(scope="module")
def watched(collector: tuple[str, Collector], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server with everything on, and room for two in its queue."""
    log = tmp_path_factory.mktemp("log") / "log.json"
    command = [
        BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
        "--log-format", "json", "--otlp-endpoint", collector[0],
        "--max-queued-requests", "3", "--max-queued-per-tenant", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "200", "LORA_SERVER_ENGINE_MAX_ACTIVE_IMAGES": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            metrics = next(json.loads(line)["address"] for line in log.read_text().splitlines() if '"metrics"' in line)
            yield Watched(address, metrics, log, collector[1])
        finally:
            process.terminate()
            assert process.wait(timeout=40) == 0
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def client(watched: Watched) -> Iterator[LoraClient]:
    """A client of that server."""
    with LoraClient(watched.address, timeout_s=60, retry=RetryPolicy(max_attempts=1)) as client:
        yield client


def eventually(condition: Any, timeout_s: float = 10.0) -> Any:
    """Waits until *condition* holds, and returns what it returned."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return found


def test_a_request_is_seen_from_all_sides(
    watched: Watched, client: LoraClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request: one line without its prompt, its metrics, and spans of every stage in the caller's own trace."""
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE_ID}-b7ad6b7169203331-01")
    before = watched.metric('lora_requests_total{outcome="OK"}')
    stats = client.generate(
        PROMPT, adapters=["neon:0.5"], options=GenerationOptions(num_inference_steps=3, request_id="seen")
    ).stats
    (line,) = eventually(lambda: watched.request_lines("seen"))
    assert (line["event"], line["outcome"], line["tenant"]) == ("request", "OK", "default")
    assert line["adapters"][0].startswith("neon@sha256:")
    assert line["total_s"] == pytest.approx(stats.total_time_s, abs=0.05)  # taken a moment later
    assert PROMPT not in watched.log.read_text()
    assert watched.metric('lora_requests_total{outcome="OK"}') == before + 1
    assert watched.metric('lora_adapter_uses_total{adapter="neon"}') >= 1
    assert watched.metric("lora_leases") == 0

    def ours() -> dict[str, Any]:
        return {span.name: span for span in watched.collector.spans if span.trace_id.hex() == TRACE_ID}

    wanted = {"request", "queue", "adapter_wait", "encode", "denoise", "decode"}
    spans = eventually(lambda: ours() if wanted <= ours().keys() and len(ours()) > len(wanted) else None)
    (call,) = [span for name, span in spans.items() if name.startswith("/lora_api.v1.")]
    assert call.parent_span_id.hex() == "b7ad6b7169203331"
    assert spans["request"].parent_span_id == call.span_id
    assert all(spans[name].parent_span_id == spans["request"].span_id for name in wanted - {"request"})
    steps = next(each.value.int_value for each in spans["denoise"].attributes if each.key == "lora.steps")
    assert steps == 3


def test_a_failed_call_is_an_error_in_its_trace(watched: Watched, client: LoraClient) -> None:
    """The status of the call's span is the call's, not the 0 of the instrumentation."""
    with pytest.raises(Exception, match="nobody"):
        client.generate(PROMPT, adapters=["nobody"], options=QUICK)

    def status() -> list[int]:
        return [
            each.value.int_value
            for span in watched.collector.spans
            if span.name.startswith("/lora_api") and span.status.code == 2
            for each in span.attributes
            if each.key == "rpc.grpc.status_code"
        ]

    assert eventually(status) == [grpc.StatusCode.NOT_FOUND.value[0]]


def test_a_full_queue_says_when_to_come_back(watched: Watched, client: LoraClient) -> None:
    """The third that waits of one tenant is refused at once; after the time it was told, it is let in."""
    client.generate(PROMPT, options=QUICK)  # so that the rate is known
    long = GenerationOptions(num_inference_steps=150, width_px=64, height_px=64)
    results: list[Any] = []

    def ask() -> None:
        results.append(client.generate(PROMPT, options=long))

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for number, caller in enumerate(callers):
        caller.start()  # one runs, the others wait
        wanted = ("queued_requests", number) if number else ("running_requests", 1)
        eventually(lambda wanted=wanted: client.server_info().queue[wanted[0]] == wanted[1])
    began_s = time.monotonic()
    with pytest.raises(QueueFullError) as full:
        client.generate(PROMPT, options=QUICK)
    assert time.monotonic() - began_s < 2
    assert full.value.metadata["max_queued_per_tenant"] == "2"
    assert full.value.retry_after_s is not None
    assert 0.1 <= full.value.retry_after_s < 60
    assert watched.metric('lora_requests_refused_total{reason="QUEUE_FULL"}') == 1
    assert watched.metric("lora_queue_estimated_wait_seconds") > 0
    time.sleep(full.value.retry_after_s)
    deadline_s = time.monotonic() + 2 * full.value.retry_after_s + 2  # an estimate is no promise
    while True:
        try:
            client.generate(PROMPT, options=QUICK)
            break
        except QueueFullError:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    for caller in callers:
        caller.join()
    assert len(results) == 3


def test_top_shows_the_server(watched: Watched) -> None:
    """Lines when it is no terminal, with the adapters by use; a picture of all sections as JSON."""
    command = [BIN / "lora-client", "--server", watched.address, "top", "--interval", "0.25"]
    lines = subprocess.run([*command, "--count", "2"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert "queue 0/3" in lines[0]
    assert "neon 1" in lines[0]
    shown = subprocess.run([*command, "--count", "1", "--json"], capture_output=True, text=True, check=True).stdout
    assert {"queue", "cache", "engine", "adapters"} <= json.loads(shown).keys()


def test_a_watcher_does_not_hold_up_anybody(watched: Watched, client: LoraClient) -> None:
    """The next request is served while somebody watches, and he is told of it."""
    looks = client.watch_server(interval_s=0.25)
    before = next(looks).engine["finished_requests"]
    client.generate(PROMPT, options=QUICK)
    assert int(str(eventually(lambda: next(looks)).engine["finished_requests"])) >= int(str(before))
    assert eventually(lambda: next(looks).engine["finished_requests"] == int(str(before)) + 1)
    looks.close()


def test_a_cancelled_request_has_its_line(watched: Watched, client: LoraClient) -> None:
    """With REQUEST_CANCELLED as its outcome, and no lease left behind."""
    options = GenerationOptions(num_inference_steps=200, request_id="left-alone")
    events = client.stream_generate(PROMPT, adapters=["neon"], options=options)
    next(iter(events))
    events.close()
    (line,) = eventually(lambda: watched.request_lines("left-alone"))
    assert line["outcome"] == "REQUEST_CANCELLED"
    eventually(lambda: watched.metric("lora_leases") == 0)

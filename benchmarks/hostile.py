"""Clients that do harm, on loopback, against a server of their own, and what one honest client notices of it.

python -m benchmarks.hostile --out hostile.json      # about four minutes

For each attack: the honest client's latencies beside the quiet server's, the server's memory, descriptors and leases
afterwards, and whether its books are right (`check_integrity`). Exits with 1 if something leaked or an honest request
failed. Server, attackers and the honest client are processes of their own; the model is the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_api.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)
from lora_client import AsyncLoraClient, GenerationOptions, RetryPolicy
from lora_client.addresses import proxy_options
from lora_client.errors import LoraClientError, QueueFullError

from benchmarks.load import quantiles

STALLED_READER_TIMEOUT_S = 5.0
VICTIM = GenerationOptions(num_inference_steps=4, width_px=64, height_px=64)
MAX_GROWTH_BYTES = 192 * 2**20
"""What an attack may leave the process with: allocators keep arenas; a leak of images or calls would exceed it."""


# The server, in a process of its own


def serve() -> None:
    """Runs a server and answers lines on standard input with its books, as JSON."""
    from lora_server.app import build_core
    from lora_server.config import EngineConfig, RpcConfig, ServerConfig
    from lora_server.rpc.backend import Backend
    from lora_server.rpc.server import RpcServer
    from lora_server.telemetry.logs import configure_logging
    from lora_server.threads import in_own_thread

    configure_logging("error")
    config = ServerConfig(
        engine=EngineConfig(max_queued_requests=64),
        rpc=RpcConfig(listen="127.0.0.1:0", stalled_reader_timeout_s=STALLED_READER_TIMEOUT_S),
    )

    async def run() -> None:
        core = await asyncio.wrap_future(in_own_thread(lambda: build_core(config)))
        rpc = RpcServer(config)
        address = await rpc.start()
        await rpc.serve(Backend(core.engine, core.manager, "hostile", time.time(), 60.0))
        print(json.dumps({"address": address}), flush=True)
        while question := await asyncio.to_thread(sys.stdin.readline):
            books: dict[str, Any] = {"calls_inside": rpc._gate._inside}
            if question.strip() == "books":  # not while latencies are measured: it stops the event loop
                core.manager.check_integrity()
                core.engine.call(lambda runner, _: runner.pages.check_integrity()).result(timeout=30)
                books |= core_books(core)
            print(json.dumps(books), flush=True)
        await rpc.stop()
        core.stop()

    asyncio.run(run())


def core_books(core: Any) -> dict[str, Any]:
    """What the process holds, counted after a collection of garbage; on its event loop."""
    import gc

    gc.collect()
    queue, cache = core.engine.queue_info(), core.manager.cache_info()
    status = Path("/proc/self/status").read_text()
    return {
        "rss_bytes": int(status.split("VmRSS:")[1].split()[0]) * 1024,
        "peak_rss_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "running": queue.running_requests,
        "queued": queue.queued_requests,
        "leases": cache.leases,
        "slots_taken": len(core.manager.slots._taken),
        "tasks": len(asyncio.all_tasks()),
    }


class Server:
    """The child."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.hostile", "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address: str = json.loads(self._process.stdout.readline())["address"]

    async def books(self) -> dict[str, Any]:
        """Its books; fails if they are wrong. Stops its event loop for a moment."""
        return await self._ask("books")

    async def calls_inside(self) -> int:
        """How many calls it serves."""
        return int((await self._ask("calls"))["calls_inside"])

    async def _ask(self, question: str) -> dict[str, Any]:

        def ask() -> dict[str, Any]:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
            found: dict[str, Any] = json.loads(self._process.stdout.readline())
            return found

        return await asyncio.to_thread(ask)

    def stop(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


# The honest client


async def honest(address: str, until: Callable[[], bool]) -> dict[str, Any]:
    """One caller with an adapter, and health checks beside it, until *until*: latencies and failures."""
    latencies: list[float] = []
    health: list[float] = []
    refused, failed = 0, []

    async def check_health(client: AsyncLoraClient) -> None:
        while not until():
            began_s = time.monotonic()
            await client.health()
            health.append(time.monotonic() - began_s)
            await asyncio.sleep(0.1)

    async with AsyncLoraClient(address, timeout_s=120, retry=RetryPolicy(max_attempts=1)) as client:
        checking = asyncio.ensure_future(check_health(client))
        while not until():
            began_s = time.monotonic()
            try:
                await client.generate("a red star", seed=1, adapters=["neon"], options=VICTIM)
                latencies.append(time.monotonic() - began_s)
            except QueueFullError as error:
                refused += 1
                await asyncio.sleep(error.retry_after_s or 0.1)
            except LoraClientError as error:
                failed.append(f"{error.reason}: {error}")
        await checking
    return {
        "requests": len(latencies), "refused": refused, "failed": failed[:3], "num_failed": len(failed),
        **quantiles(latencies), "health": quantiles(health),
    }  # fmt: skip


# The attacks; each returns facts of its own


def _request(steps: int, images: int = 1, side_px: int = 64) -> generation_service_pb2.StreamGenerateRequest:
    spec = generation_service_pb2.GenerationSpec(
        prompt="a red star", num_inference_steps=steps, num_images=images, width_px=side_px, height_px=side_px
    )
    spec.adapters.add().name = "neon"
    request = generation_service_pb2.StreamGenerateRequest(spec=spec)
    request.preview.interval_steps = 1
    return request


async def quiet(address: str) -> dict[str, Any]:
    """Nobody else."""
    del address
    await asyncio.sleep(15)
    return {}


async def cancelled(address: str, calls: int = 10_000) -> dict[str, Any]:
    """Calls that are cancelled after up to 20 ms, every second one after its first response, a hundred at a time."""
    codes: dict[str, int] = {}
    async with grpc.aio.insecure_channel(address, options=proxy_options(address)) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)

        async def caller(count: int) -> None:
            for k in range(count):
                call = stub.StreamGenerate(_request(500))
                if k % 2:
                    with suppress(grpc.aio.AioRpcError):
                        await call.read()  # it is accepted, or refused
                else:
                    await asyncio.sleep(0.02 * (k % 5) / 4)
                call.cancel()
                code = (await call.code()).name
                codes[code] = codes.get(code, 0) + 1

        began_s = time.monotonic()
        await asyncio.gather(*[caller(calls // 100) for _ in range(100)])
    return {"calls": calls, "seconds": time.monotonic() - began_s, "codes": codes}


async def idle_streams(address: str, streams: int = 1_000) -> dict[str, Any]:
    """Health.Watch streams that stay open, and as many WatchServer streams as are let in; for ten seconds."""
    options = [("grpc.use_local_subchannel_pool", 1), *proxy_options(address)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(20)]
    watching = []
    for k in range(streams):
        stub: Any = health_pb2_grpc.HealthStub(channels[k % len(channels)])
        call = stub.Watch(health_pb2.HealthCheckRequest())
        await call.read()
        watching.append(call)
    codes: dict[str, int] = {}
    for k in range(100):
        server = server_service_pb2_grpc.ServerServiceStub(channels[k % len(channels)])
        watch: Any = server.WatchServer(server_service_pb2.WatchServerRequest())
        try:
            codes["let in"] = codes.get("let in", 0) + (await watch.read() is not grpc.aio.EOF)
        except grpc.aio.AioRpcError as error:
            codes[error.code().name] = codes.get(error.code().name, 0) + 1
        watching.append(watch)
    await asyncio.sleep(10)
    for call in watching:
        call.cancel()
    await asyncio.gather(*[channel.close() for channel in channels])
    return {"streams": streams, "watch_server": codes}


async def reads_nothing(address: str, clients: int = 8, seconds: float = 45) -> dict[str, Any]:
    """Clients with connections of their own that ask for two large images, with previews, and read none of them."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    channels = [grpc.aio.insecure_channel(address, options=options + proxy_options(address)) for _ in range(clients)]
    calls = [
        generation_service_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(_request(2, 2, 384))
        for channel in channels
    ]
    await asyncio.sleep(seconds)
    for call in calls:
        call.cancel()
    await asyncio.gather(*[channel.close() for channel in channels])
    return {"clients": clients, "seconds": seconds}


async def hung(address: str, clients: int = 4) -> dict[str, Any]:
    """Processes that begin a request of 500 steps and are stopped (SIGSTOP), for as long as the server keeps them."""
    code = (
        "import sys; from lora_client import *\n"
        "events = LoraClient(sys.argv[1]).stream_generate('x', adapters=['neon'], options=GenerationOptions("
        "num_inference_steps=500, width_px=384, height_px=384))\n"
        "[next(events) for _ in range(3)]; print('begun', flush=True)\n"
        "for event in events: pass\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(clients)
    ]
    for process in processes:
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGSTOP)
    began_s = time.monotonic()
    try:
        async with AsyncLoraClient(address, timeout_s=30) as client:
            while time.monotonic() - began_s < 90:
                queue = (await client.server_info()).queue
                if int(str(queue["running_requests"])) + int(str(queue["queued_requests"])) <= 1:  # the honest one
                    break
                await asyncio.sleep(0.5)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return {"clients": clients, "let_go_after_s": time.monotonic() - began_s}


async def slow_loris(address: str, connections: int = 500) -> dict[str, Any]:
    """Connections that send HTTP/2's preface a byte a second, until the server has closed all of them."""
    host, port = address.split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    async def connect() -> float:
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for k in range(90):
                writer.write(preface[k % len(preface) : k % len(preface) + 1])
                await writer.drain()
                try:
                    while await asyncio.wait_for(reader.read(4096), 1.0):
                        pass
                    break
                except TimeoutError:
                    continue
        except OSError:
            pass
        finally:
            writer.close()
        return time.monotonic() - began_s

    lasted = await asyncio.gather(*[connect() for _ in range(connections)])
    return {"connections": connections, "closed_after_s": max(lasted)}


ATTACKS: dict[str, Callable[[str], Awaitable[dict[str, Any]]]] = {
    "quiet": quiet,
    "cancelled": cancelled,
    "idle_streams": idle_streams,
    "reads_nothing": reads_nothing,
    "hung": hung,
    "slow_loris": slow_loris,
}


async def _run_attack(name: str, address: str) -> dict[str, Any]:
    return await ATTACKS[name](address)


async def run(names: list[str]) -> dict[str, Any]:
    """Runs the attacks one after another against one server; returns what was measured."""
    server = Server()
    results: dict[str, Any] = {}
    try:
        async with AsyncLoraClient(server.address) as client:
            for _ in range(20):
                await client.generate("a red star", adapters=["neon"], options=VICTIM)
        before = await server.books()
        for name in names:
            attack = asyncio.ensure_future(_attack(name, server.address))
            watching = asyncio.ensure_future(_watch(server, attack.done))
            seen = await honest(server.address, attack.done)
            facts = {**await attack, **await watching}
            books = await _settled(server)
            results[name] = {"attack": facts, "honest": seen, "books": books, "faults": _faults(seen, books, before)}
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    finally:
        server.stop()
    return {"before": before, **results}


async def _attack(name: str, address: str) -> dict[str, Any]:
    """Runs an attack in a process of its own, so that its own load is not taken for the server's."""
    command = [sys.executable, "-m", "benchmarks.hostile", "--attack", name, "--address", address]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    facts: dict[str, Any] = json.loads(out)
    return facts


async def _watch(server: Server, until: Callable[[], bool]) -> dict[str, Any]:
    """Looks at the server twice a second: the most calls inside, and since when only the honest one was."""
    began_s, most, alone_since_s = time.monotonic(), 0, 0.0
    while not until():
        inside = await server.calls_inside()
        most = max(most, inside)
        if inside > 2:  # the honest request and a health check
            alone_since_s = time.monotonic() - began_s
        await asyncio.sleep(0.5)
    return {"most_calls_inside": most, "last_seen_inside_s": alone_since_s}


async def _settled(server: Server) -> dict[str, Any]:
    """The books once nobody runs or waits, or after 15 seconds."""
    for _ in range(30):
        books = await server.books()
        if not (books["running"] or books["queued"] or books["leases"]) and books["tasks"] < 50:
            break
        await asyncio.sleep(0.5)
    return books


def _faults(seen: dict[str, Any], books: dict[str, Any], before: dict[str, Any]) -> list[str]:
    faults = [f"{key} left: {books[key]}" for key in ("running", "queued", "leases", "slots_taken") if books[key]]
    if seen["num_failed"]:
        faults.append(f"honest requests failed: {seen['failed']}")
    if books["rss_bytes"] - before["rss_bytes"] > MAX_GROWTH_BYTES:
        faults.append(f"memory grew by {(books['rss_bytes'] - before['rss_bytes']) / 2**20:.0f} MiB")
    if books["descriptors"] > before["descriptors"] + 20:
        faults.append(f"descriptors grew from {before['descriptors']} to {books['descriptors']}")
    return faults


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, in this order")
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    if arguments.attack:
        print(json.dumps(asyncio.run(_run_attack(arguments.attack, arguments.address))))
        return
    results = asyncio.run(run(arguments.attacks.split(",")))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    faults = [fault for each in results.values() for fault in each.get("faults", ())]
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()

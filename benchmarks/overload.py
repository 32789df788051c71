"""A true server with the embedded model at several times of what it can do: what gets through, and are promises kept.

python -m benchmarks.overload --seconds 30 --times 10 --out out/overload.json

Four loads, one after the other, on one server, so that ratios mean something on a busy machine, too:

| load | what |
|---|---|
| unloaded | one caller |
| capacity | as many callers as keep it full |
| refused | arrivals at --times the capacity; who is refused goes away |
| patient | --times as many callers as for the capacity, who all come back when they are told (the client's default) |

Goodput is images a second by `benchmarks.load.rate`; a promise is `Queued.expected_time` of an admitted request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_client import AsyncLoraClient, GenerationOptions, RetryPolicy
from lora_client.errors import LoraClientError, QueueFullError
from lora_client.types import Completed, Queued

from benchmarks.load import quantiles, rate

_ONCE = RetryPolicy(max_attempts=1)


@dataclass
class Outcome:
    """What became of the requests of one load; times in seconds."""

    latencies_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    retries_s: list[float] = field(default_factory=list)
    refused: int = 0
    waits: int = 0
    errors: list[str] = field(default_factory=list)

    def summary(self, began_s: float, until_s: float) -> dict[str, Any]:
        """Numbers of all that ended before *until_s*, and of how promises were kept by all."""
        shares = quantiles(self.shares)
        return {
            "images_per_s": rate([end for end in self.ends_s if end <= until_s], began_s),
            "finished": len(self.latencies_s),
            "refused": self.refused,
            "came_back": self.waits,
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            **quantiles(self.latencies_s),
            "of_promise_p50": shares.get("p50_s"),
            "of_promise_p99": shares.get("p99_s"),
            "retry_after": quantiles(self.retries_s),
        }


class Caller:
    """Sends requests and notes what comes."""

    def __init__(self, address: str, options: GenerationOptions, outcome: Outcome) -> None:
        self._outcome = outcome
        self._options = options
        self._once = AsyncLoraClient(address, retry=_ONCE)
        self._patient = AsyncLoraClient(address, retry=RetryPolicy(max_attempts=1000, on_wait=self._waits))

    async def close(self) -> None:
        """Ends the connections."""
        await self._once.close()
        await self._patient.close()

    def _waits(self, seconds: float, error: LoraClientError) -> None:
        del error
        self._outcome.waits += 1
        self._outcome.retries_s.append(seconds)

    async def send(self, *, patient: bool = False) -> None:
        """Makes one request; its latency counts from when it was let in."""
        client, outcome = self._patient if patient else self._once, self._outcome
        began_s, promised_s = time.monotonic(), None
        try:
            async for event in client.stream_generate("a star", seed=random.randrange(2**31), options=self._options):
                if isinstance(event, Queued) and promised_s is None:
                    promised_s, began_s = event.expected_time_s or 0.0, time.monotonic()
                elif isinstance(event, Completed):
                    outcome.ends_s.append(time.monotonic())
                    outcome.latencies_s.append(time.monotonic() - began_s)
                    if promised_s:
                        outcome.shares.append(outcome.latencies_s[-1] / promised_s)
        except QueueFullError as error:
            outcome.refused += 1
            outcome.retries_s.append(error.retry_after_s or 0.0)
        except LoraClientError as error:
            outcome.errors.append(f"{error.reason or error.code}: {error}"[:120])


async def closed(caller: Caller, callers: int, until_s: float, *, patient: bool = False) -> None:
    """Each caller sends one request after the other until *until_s*; what is under way then is given up."""

    async def one() -> None:
        while time.monotonic() < until_s:
            await caller.send(patient=patient)

    tasks = [asyncio.ensure_future(one()) for _ in range(callers)]
    _, late = await asyncio.wait(tasks, timeout=max(0.0, until_s - time.monotonic()) + 0.5)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def arrivals(caller: Caller, rate_per_s: float, until_s: float) -> None:
    """Requests arrive at random, at *rate_per_s*; those that were let in are finished."""
    tasks = []
    due_s = time.monotonic()
    while due_s < until_s:
        due_s += random.expovariate(rate_per_s)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        tasks.append(asyncio.ensure_future(caller.send()))
    await asyncio.gather(*tasks)


async def measure(address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the four loads; returns what each did, and the ratios."""
    options = GenerationOptions(
        width_px=arguments.side, height_px=arguments.side, num_inference_steps=arguments.steps,
        progress_interval_steps=arguments.steps,
    )  # fmt: skip
    found: dict[str, Any] = {}

    async def load(name: str, seconds: float, run: Callable[[Caller, float], Awaitable[None]]) -> dict[str, Any]:
        outcome = Outcome()
        caller, began_s = Caller(address, options, outcome), time.monotonic()
        await run(caller, began_s + seconds)
        await caller.close()
        found[name] = outcome.summary(began_s, began_s + seconds)
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
        return found[name]

    await load("warm", 2, lambda caller, until: closed(caller, 4, until))
    await load("unloaded", arguments.seconds / 3, lambda caller, until: closed(caller, 1, until))
    full = arguments.callers
    capacity = await load("capacity", arguments.seconds, lambda caller, until: closed(caller, full, until))
    offered = arguments.times * capacity["images_per_s"]
    await load("refused", arguments.seconds, lambda caller, until: arrivals(caller, offered, until))
    many = arguments.times * full
    await load("patient", arguments.seconds, lambda caller, until: closed(caller, many, until, patient=True))
    again = await load("capacity again", arguments.seconds, lambda caller, until: closed(caller, full, until))
    most = (capacity["images_per_s"] + again["images_per_s"]) / 2
    return {
        "offered_per_s": offered,
        "loads": found,
        "goodput_of_capacity": {name: found[name]["images_per_s"] / most for name in ("refused", "patient")},
        "p99_of_promise": {name: found[name]["of_promise_p99"] for name in ("refused", "patient")},
        "p99_of_unloaded": {name: found[name]["p99_s"] / found["unloaded"]["p50_s"] for name in ("refused", "patient")},
    }


def print_table(found: dict[str, Any]) -> None:
    """Prints the loads as a table, and the ratios."""
    print("| load | images/s | finished | refused | came back | p50 s | p99 s | p99 of promise |")
    print("|---|---|---|---|---|---|---|---|")
    for name, load in found["loads"].items():
        kept = f"{load['of_promise_p99']:.2f}" if load["of_promise_p99"] else ""
        print(
            f"| {name} | {load['images_per_s']:.2f} | {load['finished']} | {load['refused']} | {load['came_back']} "
            f"| {load.get('p50_s', 0):.2f} | {load.get('p99_s', 0):.2f} | {kept} |"
        )
    for name in ("goodput_of_capacity", "p99_of_promise", "p99_of_unloaded"):
        print(f"{name}: " + ", ".join(f"{load} {value:.2f}" for load, value in found[name].items()))


def main() -> None:
    """Starts a server, loads it, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--times", type=int, default=10, help="offered load, in capacities")
    parser.add_argument("--callers", type=int, default=24, help="that keep the server full")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/overload.json"))
    parser.add_argument("server", nargs="*", help="further options of lora-server serve, after --")
    arguments = parser.parse_args()
    command = [Path(sys.executable).parent / "lora-server", "serve", "--listen", "127.0.0.1:0", *arguments.server]
    environment = {**os.environ, "LORA_SERVER_LOG_LEVEL": "error"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        found = asyncio.run(measure(address, arguments))
    finally:
        process.terminate()
        process.wait(timeout=60)
    print_table(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

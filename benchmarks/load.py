"""A load on the service through its port, in a process of its own: closed (so many callers) or open (Poisson arrivals).

python -m benchmarks.load '{"address": ..., ...}' prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from lora_client import AsyncLoraClient, GenerationOptions
from lora_client.errors import LoraClientError

WORDS = ("red", "green", "blue", "star", "ring", "moon", "heart", "big", "small", "on", "a", "white", "navy", "top")

# Popularity of adapters, from 20 days of two production services (published with Katz, ATC'25): cumulative shares of
# uses by rank. Between the given points uses are spread evenly.
PROFILES = {
    "A": ((16, 0.26), (146, 0.50), (1105, 0.76), (7000, 1.0)),
    "B": ((2, 0.27), (13, 0.53), (152, 0.75), (1420, 0.90), (7000, 1.0)),
}


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        address: HOST:PORT.
        adapters: Their names, the most popular first; empty for the base model.
        concurrency: Callers of a closed load; 0 for an open one.
        rate: Arrivals a second of an open load.
        seconds: How long requests are begun; those begun are finished.
        warm: Requests that are made first, and not counted.
        profile: `uniform`, `A` or `B`.
    """

    address: str
    adapters: tuple[str, ...]
    side_px: int
    steps: int
    guidance_scale: float
    seconds: float
    concurrency: int = 0
    rate: float = 0.0
    warm: int = 0
    profile: str = "uniform"
    seed: int = 0


def run(load: Load) -> dict[str, object]:
    """Runs *load* in a child process and returns what it measured."""
    command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(load))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=load.seconds * 3 + 240)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def popularity(profile: str, count: int) -> list[float]:
    """Weight of each of *count* adapters, the most popular first."""
    if profile == "uniform":
        return [1.0] * count
    weights, first, before = [], 0, 0.0
    for last, share in PROFILES[profile]:
        weights += [(share - before) / (last - first)] * (last - first)
        first, before = last, share
    return weights[:count]


class _Sender:
    def __init__(self, load: Load, client: AsyncLoraClient) -> None:
        self._load = load
        self._client = client
        self._rng = random.Random(load.seed)
        self._weights = popularity(load.profile, len(load.adapters))
        self.latencies_s: list[float] = []
        self.ends_s: list[float] = []
        self.stats: list[dict[str, object]] = []
        self.errors: list[str] = []

    async def send(self, *, counted: bool = True) -> None:
        load, rng = self._load, self._rng
        uses = rng.choices(load.adapters, self._weights) if load.adapters else []
        options = GenerationOptions(
            width_px=load.side_px,
            height_px=load.side_px,
            num_inference_steps=load.steps,
            guidance_scale=load.guidance_scale,
            progress_interval_steps=load.steps,
        )
        prompt = " ".join(rng.choices(WORDS, k=12))
        began_s = time.monotonic()
        try:
            result = await self._client.generate(prompt, adapters=uses, seed=rng.randrange(2**31), options=options)
        except LoraClientError as error:
            self.errors.append(f"{error.reason}: {error}")
            return
        if counted:
            self.ends_s.append(time.monotonic())
            self.latencies_s.append(time.monotonic() - began_s)
            stats = result.stats
            self.stats.append({
                "ways": stats.steps_by_way, "batch": stats.mean_batch_images, "queue_s": stats.queue_time_s,
                "adapter_s": stats.adapter_wait_time_s, "encode_s": stats.text_encode_time_s,
                "denoise_s": stats.denoise_time_s, "decode_s": stats.decode_time_s, "png_s": stats.image_encode_time_s,
                "states": [usage.state_on_arrival for usage in stats.adapters],
            })  # fmt: skip


async def _closed(sender: _Sender, load: Load, until_s: float) -> None:
    async def caller() -> None:
        while time.monotonic() < until_s:
            await sender.send()

    await asyncio.gather(*[caller() for _ in range(load.concurrency)])


async def _open(sender: _Sender, load: Load, until_s: float) -> None:
    rng, tasks = random.Random(load.seed + 1), []
    while time.monotonic() < until_s:
        tasks.append(asyncio.ensure_future(sender.send()))
        await asyncio.sleep(rng.expovariate(load.rate))
    await asyncio.gather(*tasks)


async def _main(load: Load) -> dict[str, object]:
    async with AsyncLoraClient(load.address, timeout_s=600) as client:
        sender = _Sender(load, client)
        await asyncio.gather(*[sender.send(counted=False) for _ in range(load.warm)])
        began_s = time.monotonic()
        await (_closed if load.concurrency else _open)(sender, load, began_s + load.seconds)
        # A closed load is full until its callers stop; what ends after that is not its rate.
        within = [end for end in sender.ends_s if end <= began_s + load.seconds]
        return {
            "images_per_s": rate(within, began_s),
            "requests": len(sender.latencies_s),
            "errors": sender.errors[:5],
            "num_errors": len(sender.errors),
            **quantiles(sender.latencies_s),
            "stats": summary(sender.stats),
        }


def rate(ends_s: list[float], began_s: float) -> float:
    """Images a second: the slope of how many have ended over time, by least squares.

    Those of a batch end together, and the first only after a whole picture's time; a count over the window would be
    off by a batch at either end. It is what is left if only a batch or two have ended, which make no slope.
    """
    if not ends_s:
        return 0.0
    lasted_s = ends_s[-1] - began_s
    if ends_s[-1] - ends_s[0] < lasted_s / 2:
        return len(ends_s) / lasted_s
    return statistics.linear_regression(ends_s, range(1, len(ends_s) + 1)).slope


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99 and mean, in the values' unit."""
    ordered = sorted(values)
    if not ordered:
        return {}
    points = {f"p{q}_s": ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 95, 99)}
    return {**points, "mean_s": sum(ordered) / len(ordered)}


def summary(stats: list[dict[str, object]]) -> dict[str, object]:
    """Means of the requests' stats, and sums of their ways and of where their adapters were."""
    found: dict[str, object] = {}
    for key in ("batch", "queue_s", "adapter_s", "encode_s", "denoise_s", "decode_s", "png_s"):
        values = [float(str(each[key])) for each in stats]
        found[key] = sum(values) / len(values) if values else 0.0
    ways: dict[str, int] = {}
    states: dict[str, int] = {}
    for each in stats:
        assert isinstance(each["ways"], dict)
        assert isinstance(each["states"], list)
        for way, steps in each["ways"].items():
            ways[way] = ways.get(way, 0) + steps
        for state in each["states"]:
            states[state] = states.get(state, 0) + 1
    return {**found, "ways": ways, "states": states}


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["adapters"] = tuple(fields["adapters"])
    print(json.dumps(asyncio.run(_main(Load(**fields)))))

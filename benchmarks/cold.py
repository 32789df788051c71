"""What an adapter costs that is not there: a change between resident ones, a cold one, and many loads beside a request.

python -m benchmarks.cold '{"address": ..., ...}' sends the requests from a process of its own; prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lora_client import AdapterUse, AsyncLoraClient, GenerationOptions
from lora_client import Progress as ProgressEvent

from benchmarks.load import quantiles

_FEW_STEPS = 4
_RUNS = 10
PROMPT = "a big red star on a navy background"


@dataclass(frozen=True)
class Cold:
    """What to send.

    Attributes:
        address: HOST:PORT.
        resident: Names of two registered adapters.
        unseen: Paths of adapters that the server has never read.
    """

    address: str
    resident: tuple[str, ...]
    unseen: tuple[str, ...]
    side_px: int
    steps: int
    guidance_scale: float


def run(cold: Cold) -> dict[str, object]:
    """Measures in a child process."""
    command = [sys.executable, "-m", "benchmarks.cold", json.dumps(asdict(cold))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the measurement failed: {done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


class _Meter:
    def __init__(self, cold: Cold, client: AsyncLoraClient) -> None:
        self._cold = cold
        self._client = client

    async def all(self) -> dict[str, object]:
        a, b = (AdapterUse(name=name) for name in self._cold.resident[:2])
        fresh = [AdapterUse(path=path) for path in self._cold.unseen]
        for use in (a, b, a):
            await self._first_step(use)
        same = [await self._first_step(a) for _ in range(_RUNS)]
        turns = [await self._first_step(b if k % 2 == 0 else a) for k in range(_RUNS)]
        cold = [await self._first_step(use) for use in fresh[:_RUNS]]
        alone = await self._intervals(b, [])
        beside = await self._intervals(b, fresh[_RUNS:])
        median = statistics.median
        return {
            "first_step_s": median(same),
            "change_added_s": median(turns) - median(same),
            "cold_added_s": median(cold) - median(same),
            "unloaded_s": await self._whole(a),
            "steps_alone": quantiles(alone),
            "steps_beside_loads": quantiles(beside),
            "loads": len(fresh) - _RUNS,
        }

    def _options(self, steps: int) -> GenerationOptions:
        side = self._cold.side_px
        return GenerationOptions(
            width_px=side, height_px=side, num_inference_steps=steps, guidance_scale=self._cold.guidance_scale
        )

    async def _first_step(self, use: AdapterUse) -> float:
        """Seconds from the request to the word that the first of a few steps is done."""
        began_s = time.monotonic()
        first_s = 0.0
        stream = self._client.stream_generate(PROMPT, adapters=[use], seed=1, options=self._options(_FEW_STEPS))
        async for event in stream:
            if isinstance(event, ProgressEvent) and not first_s:
                first_s = time.monotonic() - began_s
        return first_s

    async def _whole(self, use: AdapterUse) -> float:
        """Seconds of a whole request on an idle server."""
        began_s = time.monotonic()
        await self._client.generate(PROMPT, adapters=[use], seed=1, options=self._options(self._cold.steps))
        return time.monotonic() - began_s

    async def _intervals(self, use: AdapterUse, loads: Sequence[AdapterUse]) -> list[float]:
        """Seconds between the words of two steps of a request, while *loads* are loaded one after another."""

        async def load_all() -> None:
            for each in loads:
                await self._client.adapters.load(str(each.path))

        loading = asyncio.ensure_future(load_all())
        intervals: list[float] = []
        while not (loading.done() and len(intervals) >= 3 * self._cold.steps):
            last_s = 0.0
            options = self._options(self._cold.steps)
            async for event in self._client.stream_generate(PROMPT, adapters=[use], seed=1, options=options):
                now_s = time.monotonic()
                if isinstance(event, ProgressEvent):
                    if last_s:
                        intervals.append(now_s - last_s)
                    last_s = now_s
        await loading
        return intervals


async def _main(cold: Cold) -> dict[str, object]:
    async with AsyncLoraClient(cold.address, timeout_s=300) as client:
        return await _Meter(cold, client).all()


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields |= {key: tuple(fields[key]) for key in ("resident", "unseen")}
    print(json.dumps(asyncio.run(_main(Cold(**fields)))))

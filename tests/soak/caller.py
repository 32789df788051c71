"""One client process: callers that ask for mixed pictures, break off, run out of time, retry, and check every answer.

python -m tests.soak.caller '{"address": ..., "world": ..., "answers": ..., "seed": ..., "tasks": ...}'

Writes a line of JSON for each request; obeys `pause`, `resume` and `stop` on standard input.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_client import AsyncLoraClient, GenerationOptions, GenerationResult
from lora_client.errors import LoraClientError

from tests.soak.outcome import UNAVAILABLE, Outcome
from tests.soak.pictures import Answers, options, version_of
from tests.soak.scenes import VERSIONED, Case, Use, World, cases

PATIENCE_S = 120.0
AFTER_UNAVAILABLE_S = 0.2
WEIGHTS = {"draw": 40, "select": 20, "watch": 8, "leave": 12, "hurry": 8, "retry": 6, "unknown": 4, "invalid": 2}
"""How often a caller does what; the methods of `Caller`."""


class Caller:
    """One caller: each method is one request, and returns the name and digest it got, its images and their faults."""

    def __init__(self, address: str, client: AsyncLoraClient, world: World, answers: Answers, seed: str) -> None:
        self._address = address
        self._client = client
        self._world = world
        self._answers = answers
        self._chance = random.Random(seed)
        self._cases = cases()
        self._asked_for = ""

    async def one(self) -> Outcome:
        """Makes one request of a random kind."""
        (kind,) = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        method: Callable[[], Awaitable[dict[str, Any]]] = getattr(self, kind)
        self._asked_for, began_s = "", time.monotonic()
        try:
            facts = await method()
        except LoraClientError as error:
            asked = self._asked_for
            return Outcome(kind, began_s, time.monotonic(), type(error).__name__, str(error)[:300], name=asked)
        return Outcome(kind, began_s, time.monotonic(), **facts)

    async def draw(self) -> dict[str, Any]:
        """A whole picture, adapters by name."""
        case = self._case()
        result = await self._client.generate(
            case.prompt, seed=case.seed, adapters=_by_name(case), options=options(case)
        )
        return self._checked(case, result) | {"name": self._asked_for}

    async def select(self) -> dict[str, Any]:
        """A whole picture with a version that is named by its digest, by its folder, or beside the name."""
        case = self._case()
        uses, digest = self._selected(case)
        result = await self._client.generate(case.prompt, seed=case.seed, adapters=uses, options=options(case))
        return self._checked(case, result, digest)

    async def watch(self) -> dict[str, Any]:
        """A picture with previews, whose events are looked at: progress that falls back is a fault."""
        case = self._case()
        wanted = replace(options(case), preview_interval_steps=2)
        steps: list[int] = []
        result = None
        async for event in self._client.stream_generate(
            case.prompt, seed=case.seed, adapters=_by_name(case), options=wanted
        ):
            steps += [event.completed_steps] if hasattr(event, "total_steps") else []
            result = event
        facts = {"images": case.images, "faults": () if steps == sorted(steps) else (f"progress went {steps}",)}
        return facts if hasattr(result, "stats") else facts | {"faults": ("the stream ended without its stats",)}

    async def leave(self) -> dict[str, Any]:
        """Goes away in the middle of a long request."""
        case = self._case()
        wanted = GenerationOptions(num_inference_steps=300, width_px=64, height_px=64, preview_interval_steps=3)
        stream = self._client.stream_generate("x", adapters=_by_name(case), options=wanted)
        left = self._chance.randrange(8)
        async for _ in stream:
            left -= 1
            if left < 0:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return {}

    async def hurry(self) -> dict[str, Any]:
        """Has a deadline that cannot be met; an answer would be a fault."""
        case = self._case()
        wanted = GenerationOptions(num_inference_steps=500, width_px=128, height_px=128)
        async with AsyncLoraClient(self._address, timeout_s=self._chance.choice([0.001, 0.05, 0.5])) as hasty:
            await hasty.generate("x", adapters=_by_name(case), options=wanted)
        return {"faults": ("500 steps were made within a deadline of less than a second",)}

    async def retry(self) -> dict[str, Any]:
        """Asks twice at once with one request id, as a client does that believes its call lost: one picture."""
        case = self._case()
        asked = [
            self._client.generate(
                case.prompt, seed=case.seed, adapters=_by_name(case), options=options(case, request_id)
            )
            for request_id in [uuid.uuid4().hex] * 2
        ]
        got = await asyncio.gather(*asked, return_exceptions=True)
        for each in got:
            if isinstance(each, BaseException):
                raise each
        first, second = [each for each in got if isinstance(each, GenerationResult)]
        facts = self._checked(case, first) | {"name": self._asked_for}
        same = [image.data for image in first.images] == [image.data for image in second.images]
        return facts if same else facts | {"faults": ("two pictures for one request id", *facts["faults"])}

    async def unknown(self) -> dict[str, Any]:
        """Names an adapter that was never there."""
        await self._client.generate("x", adapters=["never-there"], options=GenerationOptions(num_inference_steps=2))
        return {"faults": ("a picture with an adapter that does not exist",)}

    async def invalid(self) -> dict[str, Any]:
        """Asks for a size that does not exist."""
        await self._client.generate("x", options=GenerationOptions(num_inference_steps=2, width_px=65, height_px=64))
        return {"faults": ("a picture of 65 pixels",)}

    def _selected(self, case: Case) -> tuple[list[str], str | None]:
        """The uses of a case in the client's notation, and the digest of the version that they ask for."""
        name = case.versioned
        way = self._chance.choice(["expected", "digest", "folder"])
        if name is None:
            return _by_name(case), None
        index = self._chance.randrange(len(self._world.digests[name]))
        digest = self._world.digests[name][index]
        selector = {"expected": f"{name}@{digest}", "digest": digest, "folder": str(self._world.version(name, index))}
        return [_text(use, selector[way] if use.name in VERSIONED else use.name) for use in case.uses], digest

    def _case(self) -> Case:
        case = self._chance.choice(self._cases)
        self._asked_for = case.versioned or ""
        return case

    def _checked(self, case: Case, result: GenerationResult, digest: str | None = None) -> dict[str, Any]:
        found = version_of(self._world, case, result.images[0].provenance.adapters) if result.images else None
        faults = tuple(self._answers.faults(case, result, digest))
        return {"images": len(result.images), "digest": found or "", "faults": faults}


def _by_name(case: Case) -> list[str]:
    return [_text(use, use.name) for use in case.uses]


def _text(use: Use, selector: str) -> str:
    return f"{selector}:{use.scale}{use.settings}"


async def _call(caller: Caller, going: asyncio.Event, stopped: asyncio.Event, busy: list[int]) -> None:
    while not stopped.is_set():
        await going.wait()
        busy[0] += 1
        outcome = await caller.one()
        busy[0] -= 1
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()
        if outcome.error in UNAVAILABLE:
            await asyncio.sleep(AFTER_UNAVAILABLE_S)


async def run(given: dict[str, Any]) -> None:
    """Calls until it is told to stop."""
    world = World.load(Path(given["world"]))
    answers = Answers.load(world, Path(given["answers"]))
    going, stopped, busy = asyncio.Event(), asyncio.Event(), [0]
    going.set()
    async with AsyncLoraClient(given["address"], timeout_s=PATIENCE_S) as client:
        seeds = [f"{given['seed']}-{k}" for k in range(given["tasks"])]
        callers = [Caller(given["address"], client, world, answers, seed) for seed in seeds]
        tasks = [asyncio.ensure_future(_call(caller, going, stopped, busy)) for caller in callers]
        while (order := (await asyncio.to_thread(sys.stdin.readline)).strip()) not in ("", "stop"):
            going.clear() if order == "pause" else going.set()
            while order == "pause" and busy[0]:
                await asyncio.sleep(0.02)
            sys.stdout.write(json.dumps({"obeyed": order}) + "\n")
            sys.stdout.flush()
        stopped.set()
        going.set()
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))

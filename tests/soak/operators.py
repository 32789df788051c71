"""Those who change adapters while others draw: versions, pins, unloads in use, broken files, uploads that break off."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
from lora_api.v1 import adapter_service_pb2 as messages
from lora_api.v1 import adapter_service_pb2_grpc
from lora_client import AsyncLoraClient, GenerationResult, Progress, _upload
from lora_client._assembly import ResultCollector
from lora_client.errors import AdapterError, AdapterInUseError, AdapterPinnedError, LoraClientError

from tests.soak.corruption import CORRUPTIONS, corrupt
from tests.soak.ledger import Entry, Interrupted, Ledger
from tests.soak.outcome import Outcome
from tests.soak.pictures import Answers, options
from tests.soak.scenes import BUNDLED, PUSHED, Case, World, cases, long_case

PAUSES_S = {"push": 1.5, "reload": 3.0, "pin": 1.0, "unload_in_use": 1.0, "broken": 1.0, "break_off": 1.5}
"""The mean pause of each operator between two changes; the methods of `Operators`."""

SETTLE_S = 10.0


class Gate:
    """Lets operators work, or keeps them out while the books are compared."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._inside = 0

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Waits until it is open; then counts as inside."""
        await self._open.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Lets nobody in."""
        self._open.clear()

    def open(self) -> None:
        """Lets everybody in."""
        self._open.set()

    async def empty(self) -> None:
        """Waits until nobody is inside."""
        while self._inside:
            await asyncio.sleep(0.02)


@dataclass
class Operators:
    """All operators; their outcomes, and how often they did what."""

    address: str
    client: AsyncLoraClient
    world: World
    answers: Answers
    ledger: Ledger
    chance: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    gate: Gate = field(default_factory=Gate)
    _locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def prepare(self) -> None:
        """Pushes and loads the first versions; the books begin with what the server lists then."""
        for name in PUSHED:
            await self.client.adapters.push(self.world.version(name, 0), name=name)
        await self.client.adapters.load(str(self.world.place("filed", 0)), name="filed")
        for adapter in await self.client.adapters.list():
            if adapter.name in (*PUSHED, "filed", *BUNDLED):
                self.ledger.known[adapter.name] = Entry(adapter.current_digest, None, adapter.default_scale)
        self.ledger.known["scratch"] = None
        assert not self.ledger.settle(await self.client.adapters.list())

    async def work(self, kind: str) -> None:
        """Does *kind* again and again, until it is cancelled."""
        method: Callable[[], Awaitable[list[str]]] = getattr(self, kind)
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / PAUSES_S[kind]))
            async with self.gate.inside():
                began_s = time.monotonic()
                try:
                    faults = await method()
                    outcome = Outcome(kind, began_s, time.monotonic(), faults=tuple(faults))
                except Interrupted as error:
                    cause = f"{error}: {error.__cause__}"
                    outcome = Outcome(kind, began_s, time.monotonic(), "UnavailableError", cause)
                except LoraClientError as error:
                    outcome = Outcome(kind, began_s, time.monotonic(), type(error).__name__, str(error)[:300])
            self.outcomes.append(outcome)

    @asynccontextmanager
    async def _alone_with(self, name: str) -> AsyncIterator[Entry | None]:
        """Nobody else changes *name* meanwhile; yields what is known of it."""
        async with self._locks[name]:
            if self.ledger.doubtful(name):
                raise Interrupted(name)
            yield self.ledger.known[name]

    async def push(self) -> list[str]:
        """Makes another version current by an upload; its pin follows."""
        name = self.chance.choice(PUSHED)
        async with self._alone_with(name) as entry:
            assert entry is not None
            index = self.chance.randrange(len(self.world.digests[name]))
            after = Entry(self.world.digests[name][index], entry.pin, self.chance.choice([0.5, 1.0]))
            async with self.ledger.change(name, after):
                await self.client.adapters.push(
                    self.world.version(name, index), name=name, default_scale=after.default_scale
                )
            self.counts["version changed by upload"] += after.digest != entry.digest
        return []

    async def reload(self) -> list[str]:
        """Replaces the files of a loaded name in place and loads them; a third of the time broken ones first."""
        async with self._alone_with("filed") as entry:
            assert entry is not None
            digests, folder = self.world.digests["filed"], self.world.current("filed")
            faults = []
            if self.chance.random() < 1 / 3:
                how = self.chance.choice(list(CORRUPTIONS))
                corrupt(self.world.version("filed", digests.index(entry.digest)), folder, how)
                try:
                    faults += await self._refused(how, lambda: self.client.adapters.load(str(folder), name="filed"))
                finally:
                    self.world.place("filed", digests.index(entry.digest))
            index = self.chance.randrange(len(digests))
            async with self.ledger.change("filed", replace(entry, digest=digests[index])):
                self.world.place("filed", index)
                await self.client.adapters.load(str(folder), name="filed")
            self.counts["version changed in place"] += digests[index] != entry.digest
        return faults

    async def pin(self) -> list[str]:
        """Pins or unpins; two names at most are pinned."""
        name = self.chance.choice([*PUSHED, "filed", "neon", "hatching"])
        async with self._alone_with(name) as entry:
            assert entry is not None
            pins = sum(each is not None and each.pin is not None for each in self.ledger.known.values())
            if entry.pin is not None or pins >= 2:
                async with self.ledger.change(name, replace(entry, pin=None)):
                    await self.client.adapters.unpin(name)
                self.counts["unpinned"] += entry.pin is not None
                return []
            level = self.chance.choice(["host", "device"])
            async with self.ledger.change(name, replace(entry, pin=level)):
                await self.client.adapters.pin(name, level=level)
            self.counts[f"pinned, {level}"] += 1
        return []

    async def unload_in_use(self) -> list[str]:
        """Takes an adapter away from a running request: refused, and then drained, or unloaded once it was left."""
        async with self._alone_with("scratch") as entry:
            if entry is None:
                async with self.ledger.change("scratch", Entry(self.world.digests["scratch"][0], None, 1.0)):
                    await self.client.adapters.load(str(self.world.version("scratch", 0)), name="scratch")
            begun = asyncio.Event()
            running = asyncio.ensure_future(self._draw(long_case(), begun))
            waiting = asyncio.ensure_future(begun.wait())
            try:
                await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    await running
                return await self._take_away(running)
            finally:
                waiting.cancel()
                running.cancel()
                await asyncio.gather(running, waiting, return_exceptions=True)

    async def _take_away(self, running: asyncio.Future[GenerationResult]) -> list[str]:
        try:
            async with self.ledger.change("scratch", None):
                await self.client.adapters.unload("scratch")
            return ["an adapter that a request uses was unloaded without drain"]
        except AdapterInUseError:
            self.counts["unload in use, refused"] += 1
        if self.chance.random() < 0.3:
            faults = await self._unload_pinned()
        elif self.chance.random() < 0.5:
            running.cancel()
            faults = await self._unload_soon()
            self.counts["unload after its user has left"] += 1
            return faults
        else:
            async with self.ledger.change("scratch", None):
                await self.client.adapters.unload("scratch", drain=True)
            faults = []
            self.counts["unload in use, drained"] += 1
        return faults + self.answers.faults(long_case(), await running)

    async def _unload_pinned(self) -> list[str]:
        entry = self.ledger.known["scratch"]
        assert entry is not None
        async with self.ledger.change("scratch", replace(entry, pin="host")):
            await self.client.adapters.pin("scratch")
        try:
            async with self.ledger.change("scratch", None):
                await self.client.adapters.unload("scratch", drain=True)
            return ["a pinned adapter was unloaded"]
        except AdapterPinnedError:
            self.counts["unload of a pinned adapter, refused"] += 1
        async with self.ledger.change("scratch", entry):
            await self.client.adapters.unpin("scratch")
        return []

    async def _unload_soon(self) -> list[str]:
        """Unloads what nobody uses any more; that the last user is gone may take the server a step to notice."""
        for _ in range(int(SETTLE_S / 0.1)):
            try:
                async with self.ledger.change("scratch", None):
                    await self.client.adapters.unload("scratch")
                return []
            except AdapterInUseError:
                await asyncio.sleep(0.1)
        return [f"an adapter was in use {SETTLE_S:g} s after its user had left"]

    async def broken(self) -> list[str]:
        """Loads or pushes a broken adapter, under a new name or as the next version of one that is in use."""
        how, origin = self.chance.choice(list(CORRUPTIONS)), self.chance.choice(PUSHED)
        place = corrupt(self.world.version(origin, 0), self.world.root / "broken", how)
        if self.chance.random() < 0.4:
            return await self._refused(how, lambda: self.client.adapters.load(str(place), name="broken"))
        name = self.chance.choice([origin, "broken"])
        return await self._refused(how, lambda: self.client.adapters.push(place, name=name))

    async def _refused(self, how: str, call: Callable[[], Awaitable[object]]) -> list[str]:
        try:
            await call()
        except AdapterError:
            self.counts["broken adapter"] += 1
            return []
        return [f"a broken adapter was accepted: {how}"]

    async def break_off(self) -> list[str]:
        """Begins an upload, sends a part of it and is gone."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = adapter_service_pb2_grpc.AdapterServiceStub(channel).UploadAdapter()
            try:
                for part in _first_part(self.world.version("brand", 0), self.chance.random()):
                    await call.write(part)
                await asyncio.sleep(self.chance.choice([0, 0.02, 0.2]))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                return []  # the server is gone; others tell
            call.cancel()
        self.counts["upload interrupted"] += 1
        return []

    async def look(self) -> list[str]:
        """Draws a picture with each name that has versions, which is right for the version that the books have."""
        faults = []
        for name in (*PUSHED, "filed"):
            entry = self.ledger.known[name]
            case = next(each for each in cases() if each.versioned == name)
            result = await self._draw(case, asyncio.Event())
            faults += self.answers.faults(case, result, entry.digest if entry else None)
        return faults

    async def _draw(self, case: Case, begun: asyncio.Event) -> GenerationResult:
        collector = ResultCollector()
        uses = [f"{use.name}:{use.scale}{use.settings}" for use in case.uses]
        stream = self.client.stream_generate(case.prompt, seed=case.seed, adapters=uses, options=options(case))
        async for event in stream:
            if isinstance(event, Progress):
                begun.set()
            collector.add(event)
        return collector.result()


def _first_part(folder: Path, share: float) -> list[messages.UploadAdapterRequest]:
    """The messages of an upload of *folder*, the last one cut to *share* of its bytes."""
    manifest = messages.UploadManifest(name="halfway")
    *first, last = list(_upload.requests(_upload.local_files(folder), manifest))
    chunk = last.chunk
    cut = messages.UploadChunk(
        file_index=chunk.file_index, offset_bytes=chunk.offset_bytes, data=chunk.data[: int(len(chunk.data) * share)]
    )
    return [*first, *([messages.UploadAdapterRequest(chunk=cut)] if cut.data else [])]

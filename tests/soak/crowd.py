"""The client processes: started, read, paused, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
from typing import Any

from tests.soak.outcome import Outcome

OBEY_TIMEOUT_S = 150.0


class Crowd:
    """Some processes of `tests.soak.caller`, as many all the time, until `stop`."""

    def __init__(self, processes: int, chance: random.Random, given: dict[str, Any]) -> None:
        """*given* goes to each, with a seed of its own."""
        self.outcomes: list[Outcome] = []
        self.kills = 0
        self.faults: list[str] = []
        self._given = given
        self._chance = chance
        self._alive: list[asyncio.subprocess.Process | None] = [None] * processes
        self._obeyed: asyncio.Queue[str] = asyncio.Queue()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins."""
        self._tasks = [asyncio.ensure_future(self._keep(index)) for index in range(len(self._alive))]

    def kill_one(self) -> None:
        """Ends one by SIGKILL in the midst of its requests; another takes its place."""
        process = self._chance.choice([each for each in self._alive if each is not None])
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        self.kills += 1

    async def pause(self) -> None:
        """Lets all finish what they have begun and begin nothing more. Nobody may be killed meanwhile."""
        await self._order("pause")

    async def resume(self) -> None:
        """Lets all go on."""
        await self._order("resume")

    async def stop(self) -> None:
        """Ends all, once they have finished what they have begun."""
        self._stopping = True
        for process in self._alive:
            if process is not None:
                await _tell(process, "stop")
        async with asyncio.timeout(OBEY_TIMEOUT_S):
            await asyncio.gather(*self._tasks)

    async def _order(self, order: str) -> None:
        asked = [process for process in self._alive if process is not None]
        for process in asked:
            await _tell(process, order)
        async with asyncio.timeout(OBEY_TIMEOUT_S):
            for _ in asked:
                await self._obeyed.get()

    async def _keep(self, index: int) -> None:
        while not self._stopping:
            kills = self.kills
            given = json.dumps({**self._given, "seed": self._chance.randrange(2**32)})
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "tests.soak.caller", given], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._alive[index] = process
            assert process.stdout is not None
            async for line in process.stdout:
                self._hear(line)
            self._alive[index] = None
            code = await process.wait()
            if code and self.kills == kills:
                self.faults.append(f"a client process ended with {code}")

    def _hear(self, line: bytes) -> None:
        if not line.endswith(b"}\n"):
            return  # its last words
        said = json.loads(line)
        if "obeyed" in said:
            self._obeyed.put_nowait(said["obeyed"])
        else:
            self.outcomes.append(Outcome(**{**said, "faults": tuple(said["faults"])}))


async def _tell(process: asyncio.subprocess.Process, order: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(f"{order}\n".encode())
        await process.stdin.drain()

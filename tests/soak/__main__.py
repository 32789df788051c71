"""Ten minutes of mixed load and injected faults on a true server under a supervisor's loop; every answer is checked.

python -m tests.soak --minutes 10 --out soak.json

Prints a table. Exits with 1 if an answer was wrong, anything leaked, acknowledged state was lost, an error had no
cause, or the server died of itself. The first part of the time (45%) has kill -9 of the server in it; the rest is one
life of one process, at whose beginning and end everybody pauses and its memory and books are read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_client import AsyncLoraClient, LoraClient
from lora_client.errors import LoraClientError

from tests.soak import leaks, report
from tests.soak.crowd import Crowd
from tests.soak.ledger import Ledger
from tests.soak.operators import PAUSES_S, Operators
from tests.soak.pictures import Answers
from tests.soak.scenes import ALPHAS, BUNDLED, World, cases, long_case, make_versions
from tests.soak.supervisor import Supervisor

DISTURBED_SHARE = 0.45
KILL_EVERY_S = 40.0
KILL_CLIENT_EVERY_S = 12.0
WARM_SHARE, MAX_WARM_S = 0.2, 60.0
TASKS_A_PROCESS = 2
OPTIONS = (
    *("--dtype", "float64", "--threads", "1", "--warm-size", "64x64"),
    *("--log-level", "warning", "--log-format", "json"),
)
SMALL = ("--max-cached-adapters", "8", "--device-slots", "12")
"""A cache smaller than what is used, so that adapters are evicted and read again all the time."""


def say(text: str) -> None:
    """Tells the one who waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


async def expected(folder: Path) -> tuple[World, Answers]:
    """Draws all pictures on a quiet server, each alone, and writes them down for the client processes."""
    world = World(folder / "adapters", {})
    make_versions(world)
    (folder / "quiet").mkdir()
    supervisor = Supervisor(folder / "quiet", *OPTIONS, "--adapter-root", world.root)
    await supervisor.start()

    def draw() -> Answers:
        with LoraClient(supervisor.address, timeout_s=60) as client:
            for name in BUNDLED:
                world.digests[name] = [client.adapters.get(name).current_digest]
            for name, alphas in ALPHAS.items():
                folders = [str(world.version(name, index)) for index in range(len(alphas))]
                world.digests[name] = [client.adapters.load(each).current_digest for each in folders]
            return Answers.draw(client, world, [*cases(), long_case()])

    answers = await asyncio.to_thread(draw)
    await supervisor.stop()
    world.save(folder / "world.json")
    answers.save(folder / "answers.npz")
    return world, answers


class Soak:
    """One run: its actors, and what they found."""

    def __init__(self, folder: Path, minutes: float, processes: int, seed: int, world: World, answers: Answers) -> None:
        self._folder = folder
        self._seconds = minutes * 60
        self._chance = random.Random(seed)
        self._supervisor = Supervisor(
            folder, *OPTIONS, *SMALL, "--state-dir", folder / "state", "--adapter-root", world.root
        )
        self._crowd = Crowd(
            processes,
            self._chance,
            {
                "address": self._supervisor.address,
                "world": str(folder / "world.json"),
                "answers": str(folder / "answers.npz"),
                "tasks": TASKS_A_PROCESS,
            },
        )
        self._client = AsyncLoraClient(self._supervisor.address, timeout_s=60)
        self._operators = Operators(
            self._supervisor.address, self._client, world, answers, Ledger(), random.Random(seed + 1)
        )
        self._lost: list[str] = []
        self._samples: list[tuple[float, int]] = []
        self._watched: list[str] = []
        self._kills = 0

    async def run(self) -> dict[str, Any]:
        """Runs it all; returns the results."""
        await self._supervisor.start()
        await self._operators.prepare()
        self._crowd.start()
        beside = [asyncio.ensure_future(self._operators.work(kind)) for kind in PAUSES_S]
        beside += [asyncio.ensure_future(each) for each in (self._sample(), self._watch())]
        restarting = asyncio.ensure_future(self._restart_clients())
        began_s = time.monotonic()
        await self._disturbed(began_s + DISTURBED_SHARE * self._seconds)
        await self._kill(())  # what follows is one life
        first_s = time.monotonic()
        left_s = max(5.0, began_s + self._seconds - first_s)
        await asyncio.sleep(min(WARM_SHARE * left_s, MAX_WARM_S))
        before = await self._quiet_books(restarting)
        restarting = asyncio.ensure_future(self._restart_clients())
        await self._crowd.resume()
        self._operators.gate.open()
        undisturbed_s = time.monotonic()
        await asyncio.sleep(max(2.0, began_s + self._seconds - time.monotonic()))
        minutes = (time.monotonic() - began_s) / 60
        after = await self._quiet_books(restarting)
        undisturbed_s = time.monotonic() - undisturbed_s
        for task in beside:
            task.cancel()
        failed = [each for each in await asyncio.gather(*beside, return_exceptions=True) if isinstance(each, Exception)]
        await self._settle()
        await self._crowd.stop()
        await self._client.close()
        code = await self._supervisor.stop()
        return self._results(minutes, before, after, undisturbed_s, code) | {"own_faults": [repr(e) for e in failed]}

    async def _disturbed(self, until_s: float) -> None:
        """Kills the server again and again: at work, and every third time once more while it starts."""
        while (left_s := until_s - time.monotonic()) > 0:
            pause_s = self._chance.uniform(0.5, 1.5) * min(KILL_EVERY_S, left_s)
            await asyncio.sleep(min(pause_s, left_s))
            again_after_s = (self._chance.uniform(0.3, 5.0),) if self._kills % 3 == 1 else ()
            await self._kill(again_after_s)

    async def _kill(self, again_after_s: tuple[float, ...]) -> None:
        """Kills, waits for the next server, and compares its state with what was acknowledged."""
        self._operators.gate.close()
        for wait_s in (0.0, *again_after_s):
            await asyncio.sleep(wait_s)
            self._supervisor.kill()
            self._kills += 1
        say(f"killed the server ({self._kills})")
        await self._supervisor.serving()
        await self._settle()
        self._operators.gate.open()

    async def _settle(self) -> None:
        """Compares what the server lists with the books, and draws with what is in them."""
        self._operators.gate.close()
        await self._operators.gate.empty()
        await self._client.wait_ready(60)
        found = self._operators.ledger.settle(await self._client.adapters.list())
        found += [f"after a restart: {fault}" for fault in await self._operators.look()]
        for fault in found:
            say(f"LOST: {fault}")
        self._lost += found

    async def _quiet_books(self, restarting: asyncio.Task[None]) -> dict[str, Any]:
        """Lets everybody pause and reads the server's books."""
        restarting.cancel()
        self._operators.gate.close()
        await self._operators.gate.empty()
        await self._crowd.pause()
        deadline_s = time.monotonic() + 15
        while True:
            books = await self._supervisor.books()
            if not (books["running"] or books["queued"] or books["leases"]) or time.monotonic() > deadline_s:
                say(f"books: {json.dumps(books)}")
                return books
            await asyncio.sleep(0.5)

    async def _restart_clients(self) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * KILL_CLIENT_EVERY_S)
            self._crowd.kill_one()

    async def _sample(self) -> None:
        """Notes the memory of the server's latest life, once a second."""
        starts = 0
        while True:
            if self._supervisor.starts != starts:
                starts = self._supervisor.starts
                self._samples.clear()
            with suppress(OSError, IndexError):
                self._samples.append((time.monotonic(), self._supervisor.rss_bytes()))
            await asyncio.sleep(1)

    async def _watch(self) -> None:
        """Watches the server through WatchServer: its books may never say more than there is."""
        while True:
            with suppress(LoraClientError):
                async for seen in self._client.watch_server(interval_s=0.5):
                    cache = {key: int(str(value)) for key, value in seen.cache.items()}
                    for used, most in (
                        ("used_bytes", "budget_bytes"),
                        ("cached_adapters", "max_adapters"),
                        ("resident_adapters", "device_slots"),
                        ("pinned_bytes", "max_pinned_bytes"),
                    ):
                        if cache[used] > cache[most]:
                            self._watched.append(f"{used} {cache[used]} of {cache[most]}")
            await asyncio.sleep(0.5)

    def _results(
        self, minutes: float, before: dict[str, Any], after: dict[str, Any], undisturbed_s: float, code: int
    ) -> dict[str, Any]:
        crowd, operators, supervisor = self._crowd, self._operators, self._supervisor
        outcomes = [*crowd.outcomes, *operators.outcomes]
        late = self._samples[len(self._samples) // 3 :]
        died = [f"the server ended of itself with {each}" for each in supervisor.unasked_deaths]
        died += [f"the last server's exit code was {code}"] if code else []
        logged = [line for line in supervisor.log.read_text().splitlines() if _is_alarming(line)]
        return {
            "minutes": round(minutes, 1),
            "machine": report.machine(),
            **report.figures(crowd.outcomes),
            "operators_by_kind": report.figures(operators.outcomes)["by_kind"],
            "operators_by_error": report.figures(operators.outcomes)["by_error"],
            "injected": {
                "kill -9 of the server": self._kills,
                "kill -9 of a client process": crowd.kills,
                "stream left in the middle": sum(each.kind == "leave" and not each.error for each in outcomes),
                "deadline that cannot be met": sum(each.kind == "hurry" for each in outcomes),
                **dict(sorted(operators.counts.items())),
            },
            "acknowledged": operators.ledger.acknowledged,
            "left_open": sum(each.error == "UnavailableError" for each in operators.outcomes),
            "unavailable_s": report.unavailabilities(crowd.outcomes, supervisor.outages),
            "memory": {
                "before": before["rss_bytes"],
                "after": after["rss_bytes"],
                "peak": after["peak_rss_bytes"],
                "slope_a_minute": leaks.slope_bytes_a_minute(late),
                "undisturbed_s": undisturbed_s,
            },
            "books": {"before": before, "after": after},
            "faults": {
                "wrong_answers": report.wrong_answers(outcomes, operators.ledger),
                "lost_acknowledged_state": self._lost,
                "leaks": [*leaks.faults(before, after), *leaks.state_faults(self._folder / "state"), *self._watched],
                "errors_without_a_cause": report.unexpected_errors(outcomes, supervisor.outages),
                "deaths_of_the_server": died,
                "errors_in_its_log": logged,
                "faults_of_the_clients": crowd.faults,
            },
        }


def _is_alarming(line: str) -> bool:
    """Whether a line of the server's log tells of something that no injected fault explains."""
    try:
        return json.loads(line).get("level") in ("error", "critical")
    except (ValueError, AttributeError):
        return bool(line.strip())


async def soak(folder: Path, minutes: float, processes: int, seed: int) -> dict[str, Any]:
    """Computes the right answers, and runs."""
    say(f"expected pictures; everything lies in {folder}")
    world, answers = await expected(folder)
    say("the load begins")
    return await Soak(folder, minutes, processes, seed, world, answers).run()


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long the load lasts")
    parser.add_argument("--processes", type=int, default=3, help="client processes, of two callers each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-soak-") as folder:
        results = asyncio.run(soak(Path(folder), arguments.minutes, arguments.processes, arguments.seed))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(report.table(results) + "\n")
    found = {**results["faults"], "faults_of_the_soak": results["own_faults"]}
    for kind, faults in found.items():
        for fault in faults[: report.SHOWN]:
            sys.stdout.write(f"{kind}: {fault}\n")
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()

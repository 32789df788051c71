"""Who has to go: decided by what connections did, without any."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from lora_server.rpc.connections import (
    ADDRESS_CALLS,
    HOT_CALLS,
    KNOWN_IDLE_S,
    MAX_UNREAD_BYTES_IN_ALL,
    STRANGERS_CALLS,
    Allowance,
    Connection,
    Connections,
    Verdict,
)
from lora_server.rpc.visits import Visits


class Clock:
    """Time that is set."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock of one's own."""
    return Clock()


@pytest.fixture
def connections(clock: Clock) -> Connections:
    """Room for 16."""
    return Connections(16, 60.0, clock)


def come(connections: Connections, count: int, host: str, *, known: bool = False) -> list[Connection]:
    """So many more of *host*."""
    first = len(connections._connections)
    made = [connections.of(f"ipv4:{host}:{first + k + 1}") for k in range(count)]
    for each in made:
        each.known = known
    return made


def test_an_allowance_leaks_and_never_overflows_for_long() -> None:
    """Twice what is allowed is all that has to leak."""
    allowance = Allowance(10, 5.0)
    assert [allowance.use(0.0) for _ in range(3)] == [1, 2, 3]
    for _ in range(100):
        allowance.use(0.0)
    assert allowance.level(0.0) == 20
    assert allowance.level(3.0) == 5
    assert allowance.level(10.0) == 0


async def test_a_stranger_is_answered_then_refused_then_held(connections: Connections) -> None:
    """A connection of its own starts anew, until its address has called too much; one with a token is never held."""
    (stranger,) = come(connections, 1, "192.0.2.1")
    verdicts = [connections.stranger(stranger) for _ in range(STRANGERS_CALLS + 2)]
    assert verdicts == [Verdict.ANSWER] * STRANGERS_CALLS + [Verdict.REFUSE, Verdict.HOLD]
    for _ in range(ADDRESS_CALLS):
        connections.stranger(stranger)
    (another,) = come(connections, 1, "192.0.2.1")
    assert [connections.stranger(another) for _ in range(HOT_CALLS + 1)][-2:] == [Verdict.ANSWER, Verdict.REFUSE]
    (elsewhere,) = come(connections, 1, "192.0.2.2")
    assert connections.stranger(elsewhere) is Verdict.ANSWER
    (proxy,) = come(connections, 1, "192.0.2.1", known=True)
    assert {connections.stranger(proxy) for _ in range(100)} == {Verdict.ANSWER, Verdict.REFUSE}


def test_strangers_make_room_first_and_those_of_one_address_before_others(
    connections: Connections, clock: Clock
) -> None:
    """Half stays free of them; of who is known, an eighth of who is idle, and never who has a call."""
    (probe,) = come(connections, 1, "192.0.2.9")
    clock.now_s += 1
    crowd = come(connections, 10, "192.0.2.1")
    assert connections._crowd(clock.now_s) == crowd[:3]
    assert probe not in connections._crowd(clock.now_s)
    connections._connections.clear()
    known = come(connections, 16, "192.0.2.1", known=True)
    known[0].calls = 1
    assert connections._crowd(clock.now_s) == []
    clock.now_s += KNOWN_IDLE_S + 1
    assert connections._crowd(clock.now_s) == known[1:3]


def test_the_worst_reader_goes_if_all_have_left_too_much(connections: Connections, clock: Clock) -> None:
    """Not while it is only just sent, and not who reads."""
    first, second = come(connections, 2, "192.0.2.1", known=True)
    first.unread[1] = (MAX_UNREAD_BYTES_IN_ALL // 2, clock.now_s)
    second.unread[2] = (MAX_UNREAD_BYTES_IN_ALL, clock.now_s)
    assert connections._worst_reader(clock.now_s) == []
    assert connections._worst_reader(clock.now_s + 60) == [second]
    del second.unread[2]
    assert connections._worst_reader(clock.now_s + 60) == []


def test_callers_of_a_unix_socket_share_nothing(connections: Connections) -> None:
    """They have no addresses: each call is one of its own, and always answered."""
    assert connections.of("unix:") is not connections.of("unix:")
    caller = connections.of("unix:")
    assert {connections.stranger(caller) for _ in range(1000)} == {Verdict.ANSWER}


async def test_a_flood_of_visits_keeps_nobody_waiting_and_wakes_one_for_one_place() -> None:
    """Beyond some hundreds who wait, who comes is let in at once; a place that is left goes to the first who waits."""
    visits, entered, leave = Visits(2, 2, grace_s=30), list[int](), asyncio.Event()

    async def visit(number: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with visits.stay(number, 60):
                entered.append(number)
                await (leave.wait() if number == 1 else asyncio.sleep(60))

    tasks = [asyncio.create_task(visit(number)) for number in range(200)]
    await asyncio.sleep(0.05)
    assert entered == [0, 1]
    leave.set()
    await asyncio.sleep(0.05)
    assert entered == [0, 1, 2]
    tasks += [asyncio.create_task(visit(number)) for number in range(200, 500)]
    await asyncio.sleep(0.2)
    assert entered[-1] == 499
    for task in tasks:
        task.cancel()


async def test_one_visit_too_many_ends_the_oldest_once_it_had_its_time() -> None:
    """Of its own kind first; nobody waits for longer than that, and who leaves lets the next one in at once."""
    visits, ended = Visits(3, 2, grace_s=0.2), list[str]()

    async def visit(name: str, key: str, for_s: float) -> None:
        try:
            async with visits.stay(key, 10):
                await asyncio.sleep(for_s)
        except TimeoutError:
            ended.append(name)

    tasks = [asyncio.create_task(visit(*each)) for each in [("a", "x", 5), ("b", "y", 5), ("c", "y", 0.05)]]
    await asyncio.sleep(0.01)
    tasks.append(asyncio.create_task(visit("d", "y", 5)))  # waits for c, who leaves
    await asyncio.sleep(0.1)
    assert ended == []
    tasks.append(asyncio.create_task(visit("e", "y", 5)))  # b goes, who is of the same key
    await asyncio.sleep(0.3)
    assert ended == ["b"]
    tasks.append(asyncio.create_task(visit("f", "z", 5)))  # a goes, the oldest of all
    await asyncio.sleep(0.3)
    assert ended == ["b", "a"]
    for task in tasks:
        task.cancel()

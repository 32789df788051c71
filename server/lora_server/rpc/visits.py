"""Room for a bounded number of visits, of which the newest stay: who comes must not wait for who never goes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass

_MAX_WAITING = 256
"""Who comes when so many wait does not: what is waited for is short, unless somebody means harm."""


@dataclass(eq=False, slots=True)
class Visit:
    """One visit, of whom; *displaced* once a newer one has taken its place."""

    key: Hashable
    limit: asyncio.Timeout
    began_s: float
    displaced: bool = False

    def displace(self) -> None:
        """Ends it."""
        self.displaced = True
        with contextlib.suppress(RuntimeError):  # it is about to end by itself
            self.limit.reschedule(asyncio.get_running_loop().time())


class Visits:
    """So many visits in all, and so many of one key. Event loop only."""

    def __init__(self, most: int, most_of_one: int, grace_s: float = 0.0) -> None:
        """Who is one too many waits, among a bounded number, until somebody leaves, or has been there for *grace_s*."""
        self._most = most
        self._most_of_one = most_of_one
        self._grace_s = grace_s
        self._waiting: dict[asyncio.Future[None], Hashable] = {}  # by key, the first first
        self._visits: dict[Visit, None] = {}  # the oldest first
        self._count_of: dict[Hashable, int] = {}

    @contextlib.asynccontextmanager
    async def stay(self, key: Hashable, most_s: float) -> AsyncIterator[Visit]:
        """Lets *key* in for *most_s*; one too many ends the oldest, of that key or of all.

        Raises:
            TimeoutError: Once it is over, by time or by a newer one.
        """
        while (oldest := self._in_the_way(key)) is not None:
            await self._await_place(key, oldest)
        async with asyncio.timeout(most_s) as limit:
            visit = Visit(key, limit, time.monotonic())
            self._visits[visit] = None
            self._count_of[key] = self._count_of.get(key, 0) + 1
            try:
                yield visit
            finally:
                self._leave(visit)

    def _in_the_way(self, key: Hashable) -> Visit | None:
        """The visit that has to go before *key* may come: none, if there is room."""
        if self._count_of.get(key, 0) >= self._most_of_one:
            return next(visit for visit in self._visits if visit.key == key)
        return next(iter(self._visits)) if len(self._visits) >= self._most else None

    async def _await_place(self, key: Hashable, oldest: Visit) -> None:
        left_s = oldest.began_s + self._grace_s - time.monotonic()
        if left_s <= 0 or len(self._waiting) >= _MAX_WAITING:
            self._forget(oldest)
            oldest.displace()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = key
        try:
            async with asyncio.timeout(left_s):
                await turn
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(turn, None)

    def _leave(self, visit: Visit) -> None:
        if visit in self._visits:  # it was not displaced
            self._forget(visit)
            self._wake_one()

    def _wake_one(self) -> None:
        """Wakes the first who would find room: to wake all for one place would take the loop's time."""
        turn = next((turn for turn, key in self._waiting.items() if self._in_the_way(key) is None), None)
        if turn is not None:
            del self._waiting[turn]
            if not turn.done():
                turn.set_result(None)

    def _forget(self, visit: Visit) -> None:
        del self._visits[visit]
        self._count_of[visit.key] -= 1
        if not self._count_of[visit.key]:
            del self._count_of[visit.key]

"""Room for a bounded number of visits, of which the newest stay: who comes must not wait for who never goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Visit:
    """One visit, of whom; *displaced* once a newer one has taken its place."""

    key: Hashable
    limit: asyncio.Timeout
    displaced: bool = False

    def displace(self) -> None:
        """Ends it."""
        self.displaced = True
        with contextlib.suppress(RuntimeError):  # it is about to end by itself
            self.limit.reschedule(asyncio.get_running_loop().time())


class Visits:
    """So many visits in all, and so many of one key. Event loop only."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._visits: dict[Visit, None] = {}  # the oldest first
        self._count_of: dict[Hashable, int] = {}

    @contextlib.asynccontextmanager
    async def stay(self, key: Hashable, most_s: float) -> AsyncIterator[Visit]:
        """Lets *key* in for *most_s*; one too many ends the oldest, of that key or of all.

        Raises:
            TimeoutError: Once it is over, by time or by a newer one.
        """
        if self._count_of.get(key, 0) >= self._most_of_one:
            self._displace(next(visit for visit in self._visits if visit.key == key))
        elif len(self._visits) >= self._most:
            self._displace(next(iter(self._visits)))
        async with asyncio.timeout(most_s) as limit:
            visit = Visit(key, limit)
            self._visits[visit] = None
            self._count_of[key] = self._count_of.get(key, 0) + 1
            try:
                yield visit
            finally:
                self._leave(visit)

    def _displace(self, visit: Visit) -> None:
        self._leave(visit)
        visit.displace()

    def _leave(self, visit: Visit) -> None:
        if visit not in self._visits:  # it was displaced
            return
        del self._visits[visit]
        self._count_of[visit.key] -= 1
        if not self._count_of[visit.key]:
            del self._count_of[visit.key]

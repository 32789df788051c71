"""When refused callers should come back: one after the other, as places become free. Pure data.

Not thread-safe: under the lock of who owns it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_MIN_S = 0.1
_MAX_S = 300.0
_JITTER = 0.2
"""Share of a wait by which it is made longer at random, so that those who were refused together do not return so."""


class Returns:
    """The latest time that refused callers of each tenant were given; none of a tenant that has room."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        """*draw* returns numbers from 0 to 1."""
        self._draw = draw
        self._last_s: dict[str, float] = {}

    def after_s(self, tenant: str, now_s: float, turn_s: float, drained_s: float) -> float:
        """Returns in how many seconds to come back, 0.1 to 300.

        A place becomes free every *turn_s*: the first caller is to take the first one, the next caller the one after
        it. In *drained_s* all that waits now has had its turn; who comes after that is spread over as long a time
        again, for nobody knows how many of those before will return.
        """
        last_s = max(self._last_s.get(tenant, now_s), now_s)
        wait_s, most_s = last_s + turn_s - now_s, max(drained_s, turn_s)
        if wait_s <= most_s:
            self._last_s[tenant] = now_s + wait_s
        spread = _JITTER if wait_s <= most_s else 1.0
        return min(_MAX_S, max(_MIN_S, min(wait_s, most_s)) * (1 + spread * self._draw()))

    def forget(self, tenant: str) -> None:
        """Begins anew for a tenant: it has room, so nobody need wait for those who were told to."""
        self._last_s.pop(tenant, None)

"""Work that is accepted and not done, and how much of it comes before a new request; pure data.

The unit is a pixel of an image for a step. Not thread-safe: under the lock of who owns it.
"""

from __future__ import annotations

from collections.abc import Hashable


class Backlog:
    """What is left of each request, by tenant.

    | invariant | |
    |---|---|
    | `total` | sum of all that is left |
    | `_sums` | the same for each tenant; no tenant without requests |
    """

    def __init__(self) -> None:
        self.total = 0
        self._sums: dict[str, int] = {}
        self._left: dict[str, dict[Hashable, int]] = {}

    @property
    def tenants(self) -> int:
        """How many tenants have requests."""
        return len(self._left)

    def put(self, tenant: str, key: Hashable, work: int) -> None:
        """Notes what is left of a request, new or known."""
        requests = self._left.setdefault(tenant, {})
        change = work - requests.get(key, 0)
        requests[key] = work
        self.total += change
        self._sums[tenant] = self._sums.get(tenant, 0) + change

    def remove(self, tenant: str, key: Hashable) -> None:
        """Forgets a request; idempotent."""
        requests = self._left.get(tenant, {})
        if key not in requests:
            return
        self.put(tenant, key, 0)
        del requests[key]
        if not requests:
            del self._left[tenant], self._sums[tenant]

    def until_done(self, tenant: str, work: int) -> int:
        """The work that fair turns do until a new request of *work* is done, its own included.

        While it is worked off, each other request of the tenant gets no more than it, and each other tenant no more
        than its tenant. Linear in the tenant's requests and in the tenants, which are bounded.
        """
        own = work + sum(min(left, work) for left in self._left.get(tenant, {}).values())
        return own + sum(min(left, own) for other, left in self._sums.items() if other != tenant)

"""How far each running request is behind its fair share of the work; pure data.

Weighted fair queueing by virtual time (GPS; Parekh and Gallager 1993), in two levels: each tenant that has running
requests is due an equal share of the work, and each running request of a tenant an equal share of the tenant's. The
virtual time of a level grows by the work that is done, divided by those who take part. What a request is behind is
remembered for as long as it runs, so that a stream of small requests cannot hold up a large one; what a tenant is
behind, or ahead, for as long as anybody has work, so that it does not matter in how many requests a tenant brings it.
Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from lora_server.scheduler.queue import Queueable

KeyT = TypeVar("KeyT")
FlowT = TypeVar("FlowT", bound=Queueable)


class _Level(Generic[KeyT]):
    """Virtual times of those who share work equally."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: dict[KeyT, float] = {}

    def __len__(self) -> int:
        return len(self.times)

    def behind(self, key: KeyT) -> float:
        return self.now - self.times[key]

    def serve(self, work: Mapping[KeyT, float]) -> None:
        self.now += sum(work.values()) / len(self.times)
        for key, amount in work.items():
            if key in self.times:
                self.times[key] += amount


class FairClock(Generic[FlowT]):
    """The virtual times of tenants and of their running requests; work is in any unit, the same for all.

    | invariant | |
    |---|---|
    | `_requests` | has a level for each tenant of `_tenants`, none of them empty |
    | `_left` | what tenants were behind that have left; nothing if nobody is here |
    """

    def __init__(self) -> None:
        self._tenants: _Level[str] = _Level()
        self._requests: dict[str, _Level[FlowT]] = {}
        self._left: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._requests.values()))

    def join(self, flow: FlowT) -> None:
        """Lets a request take part from now on; idempotent."""
        tenant = flow.tenant
        if tenant not in self._requests:
            self._requests[tenant] = _Level()
            self._tenants.times[tenant] = self._tenants.now - self._left.pop(tenant, 0.0)
        level = self._requests[tenant]
        level.times.setdefault(flow, level.now)

    def leave(self, flow: FlowT) -> None:
        """Takes a request out; idempotent."""
        tenant = flow.tenant
        level = self._requests.get(tenant)
        if level is None or level.times.pop(flow, None) is None or level.times:
            return
        self._left[tenant] = self._tenants.behind(tenant)
        del self._requests[tenant], self._tenants.times[tenant]
        if not self._requests:
            self._left.clear()
            self._tenants.now = 0.0

    def serve(self, work: Mapping[FlowT, float]) -> None:
        """Notes the work that was done together for each request; of one that has left, nothing."""
        of_tenant: dict[str, dict[FlowT, float]] = {}
        for flow, amount in work.items():
            if flow.tenant in self._requests:
                of_tenant.setdefault(flow.tenant, {})[flow] = amount
        if not of_tenant:
            return
        self._tenants.serve({tenant: sum(done.values()) for tenant, done in of_tenant.items()})
        for tenant, done in of_tenant.items():
            self._requests[tenant].serve(done)

    def behind(self, flow: FlowT) -> tuple[float, float]:
        """What is behind its fair share: (of all, the request's part of its tenant; of its tenant, the request).

        Work; negative if it is ahead, 0 if it is not here.
        """
        level = self._requests.get(flow.tenant)
        if level is None or flow not in level.times:
            return 0.0, 0.0
        return self._tenants.behind(flow.tenant) / len(level), level.behind(flow)

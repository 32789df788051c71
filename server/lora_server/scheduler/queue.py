"""Waiting jobs, one line for each tenant; pure data.

Owns the order only: tenants take turns, a tenant's jobs go first come, first served. Does not know why a job waits.
Not thread-safe: the engine thread's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What the queue asks of a job: whose it is. Jobs are compared by identity."""

    @property
    def tenant(self) -> str:
        """Whose line it waits in."""
        ...


JobT = TypeVar("JobT", bound=Queueable)


class TenantQueue(Generic[JobT]):
    """A line of jobs for each tenant, served in turns.

    | invariant | |
    |---|---|
    | a tenant in `_lines` | has at least one job |
    | the first tenant in `_lines` | is the next to be served |
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, list[JobT]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[JobT]:
        """Yields the jobs in the order in which they would be served if all were ready; mutates nothing."""
        lines = list(self._lines.values())
        for place in range(max(map(len, lines), default=0)):
            yield from (line[place] for line in lines if place < len(line))

    def push(self, job: JobT) -> None:
        """Puts *job* at the end of its tenant's line; a tenant that had none becomes the last to be served."""
        self._lines.setdefault(job.tenant, []).append(job)

    def remove(self, job: JobT) -> bool:
        """Takes *job* out, wherever it stands; returns whether it was there. The tenant keeps its turn."""
        line = self._lines.get(job.tenant, [])
        for place, waiting in enumerate(line):
            if waiting is job:
                del line[place]
                if not line:
                    del self._lines[job.tenant]
                return True
        return False

    def pop_next(self, is_ready: Callable[[JobT], bool]) -> JobT | None:
        """Takes out the first job that is ready, and lets its tenant wait for its next turn.

        Jobs that are not ready are passed over and keep their places. Returns None if none is ready.
        """
        for tenant, line in self._lines.items():
            job = next(filter(is_ready, line), None)
            if job is not None:
                self.remove(job)
                if tenant in self._lines:
                    self._lines.move_to_end(tenant)
                return job
        return None

"""Requests with images that have not begun, in the order of their turns; pure data.

Start-time fair queueing (Goyal, Vin and Cheng 1996) in two levels: tenants take turns by the work of the images that
they have begun, and so do the requests of a tenant, image by image. While several requests of a tenant wait, its
virtual time grows by the work begun, divided by them, so that new requests without end do not hold up an old one.
Owns the order only: does not know why an image waits. Not thread-safe: the engine thread's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What the queue asks of a job: whose it is. Jobs are compared by identity."""

    @property
    def tenant(self) -> str:
        """Whose line it waits in."""
        ...


JobT = TypeVar("JobT", bound=Queueable)


@dataclass(slots=True)
class _Line(Generic[JobT]):
    """A tenant's jobs, each with the virtual time up to which its images are begun, in the order of their arrival."""

    jobs: dict[JobT, float] = field(default_factory=dict)
    now: float = 0.0

    def in_turn(self) -> list[tuple[float, JobT]]:
        return sorted(((max(self.now, time), job) for job, time in self.jobs.items()), key=lambda entry: entry[0])


class FairQueue(Generic[JobT]):
    """Jobs in the order of their turns.

    | invariant | |
    |---|---|
    | a tenant in `_lines` | has at least one job |
    | a tenant in `_begun` that is not in `_lines` | has had more than its share, and is remembered until that is over |
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[JobT]] = {}
        self._begun: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(len(line.jobs) for line in self._lines.values())

    def __iter__(self) -> Iterator[JobT]:
        """Yields the jobs, the next to be served first, as if all were ready and of equal work; mutates nothing."""
        lines = [[job for _, job in self._lines[tenant].in_turn()] for tenant in self._tenants()]
        for place in range(max(map(len, lines), default=0)):
            yield from (line[place] for line in lines if place < len(line))

    def push(self, job: JobT) -> None:
        """Puts *job* into its tenant's line; idempotent."""
        line = self._lines.setdefault(job.tenant, _Line())
        line.jobs.setdefault(job, line.now)

    def remove(self, job: JobT) -> bool:
        """Takes *job* out; returns whether it was there."""
        line = self._lines.get(job.tenant)
        if line is None or line.jobs.pop(job, None) is None:
            return False
        if not line.jobs:
            del self._lines[job.tenant]
        if not self._lines:
            self._begun.clear()
            self._now = 0.0
        return True

    def next(self, may_begin: Callable[[JobT], bool]) -> JobT | None:
        """Returns the first job in turn of which an image may begin; it stays where it is. None if there is none."""
        for tenant in self._tenants():
            for _, job in self._lines[tenant].in_turn():
                if may_begin(job):
                    return job
        return None

    def begin(self, job: JobT, work: float) -> None:
        """Notes that an image of *job*, which is in the queue, begins; *work* is the image's, in any unit."""
        line = self._lines[job.tenant]
        line.now = max(line.now, line.jobs[job])
        line.jobs[job] = line.now + work
        if len(line.jobs) > 1:
            line.now += work / len(line.jobs)
        self._now = max(self._now, self._begun.get(job.tenant, 0.0))
        self._begun[job.tenant] = self._now + work
        for tenant in [each for each, until in self._begun.items() if until <= self._now and each not in self._lines]:
            del self._begun[tenant]

    def _tenants(self) -> list[str]:
        """The tenants that wait, the next in turn first; of equal ones, who came first."""
        return sorted(self._lines, key=lambda tenant: max(self._now, self._begun.get(tenant, 0.0)))

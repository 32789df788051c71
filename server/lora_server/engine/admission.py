"""From accepted to startable: the waiting line, and the adapters that each job in it still needs.

A job enters the line at once. Its adapters are resolved, and with that prefetched, while others step; a job that is
not ready is passed over, so a cold adapter delays only the request that wants it. Whoever is next takes its leases,
all or none; if it has to wait for them, others go first. If a version is gone by then, because its name has got
another one meanwhile, the request is resolved once more. Engine thread only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import structlog

from lora_server.adapters.api import ResolvedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.engine.job import EngineJob
from lora_server.errors import (
    AdapterError,
    EngineFailureError,
    LoraServerError,
)
from lora_server.scheduler.queue import TenantQueue
from lora_server.types import QueuedEvent

_log = structlog.get_logger(__name__)

_GONE = AdapterError
"""How the lease of a version fails that was there when the request was resolved: it is gone, replaced, half-written."""

_ATTEMPTS = 4
"""How often a request may find, when its turn comes, that its names mean something else by now."""


class Admission:
    """Jobs that have not started.

    | a waiting job is | when |
    |---|---|
    | in the line, pending | its adapters are being resolved |
    | in the line, not pending | it is ready and waits for its turn |
    | parked | its turn has come, and its leases have not |
    | leased | it holds its leases and starts next |
    """

    def __init__(
        self,
        manager: AdapterManager,
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[EngineJob, LoraServerError], None],
        prefetch: Callable[[Sequence[ResolvedAdapter]], None],
    ) -> None:
        """*post* hands a callable to the engine thread; *fail* ends a job; *prefetch* may upload adapters ahead."""
        self._manager = manager
        self._post = post
        self._fail = fail
        self._prefetch = prefetch
        self._line: TenantQueue[EngineJob] = TenantQueue()
        self._parked: list[EngineJob] = []
        self._leased: deque[EngineJob] = deque()

    def __iter__(self) -> Iterator[EngineJob]:
        """Yields all waiting jobs; a snapshot."""
        return iter([*self._leased, *self._parked, *self._line])

    def enter(self, job: EngineJob) -> None:
        """Puts *job* into the line and begins to resolve its adapters."""
        self._line.push(job)
        self._announce_positions()
        self._wait_for(job, self._manager.resolve(job.request.adapters, job.tenant), self._on_resolved)

    def next(self) -> EngineJob | None:
        """Takes out the job to start now, with its lease; None if none can start."""
        while not self._leased:
            job = self._line.pop_next(lambda waiting: waiting.pending is None)
            if job is None:
                return None
            self._parked.append(job)
            self._acquire(job, _ATTEMPTS)
        job = self._leased.popleft()
        self._announce_positions()
        return job

    def put_back(self, job: EngineJob) -> None:
        """Lets a job that `next` gave, and that cannot start yet, be the next one again; it keeps its lease."""
        self._leased.appendleft(job)

    def remove(self, job: EngineJob) -> None:
        """Forgets *job*, wherever it waits; what it waited for is abandoned. Its lease is the caller's to release."""
        self._line.remove(job)
        if job in self._parked:
            self._parked.remove(job)
        if job in self._leased:
            self._leased.remove(job)
        if job.pending is not None:
            job.pending.cancel()
            job.pending = None
        self._announce_positions()

    def _acquire(self, job: EngineJob, attempts: int) -> None:
        """Takes a parked job's leases; if a version is gone, asks once more what the request means."""
        assert job.resolved is not None

        def otherwise(error: LoraServerError) -> None:
            if attempts > 1 and isinstance(error, _GONE):
                self._wait_for(job, self._manager.resolve(job.request.adapters, job.tenant), resolved_again)
            else:
                self._fail(job, error)

        def resolved_again(job: EngineJob, resolved: Any) -> None:
            job.resolve(resolved)
            self._acquire(job, attempts - 1)

        self._wait_for(job, self._manager.acquire(job.resolved), self._on_acquired, otherwise)

    def _wait_for(
        self,
        job: EngineJob,
        future: Future[Any],
        then: Callable[[EngineJob, Any], None],
        otherwise: Callable[[LoraServerError], None] | None = None,
    ) -> None:
        """Calls *then* with what *future* brings; a domain error goes to *otherwise*, or ends the job."""
        failed = otherwise or partial(self._fail, job)
        job.pending = future
        began_s = time.monotonic()
        if future.done():
            self._settle(job, future, began_s, then, failed)
        else:
            future.add_done_callback(lambda done: self._post(lambda: self._settle(job, done, began_s, then, failed)))

    def _settle(
        self,
        job: EngineJob,
        future: Future[Any],
        began_s: float,
        then: Callable[[EngineJob, Any], None],
        failed: Callable[[LoraServerError], None],
    ) -> None:
        if job.pending is not future:  # removed while it waited; a lease that came all the same goes back
            _give_back(future)
            return
        job.pending = None
        now_s = time.monotonic()
        job.timings.adapter_wait_s += now_s - began_s
        if job.request.adapters:
            job.timings.note("adapter_wait", began_s, now_s)
        try:
            result = future.result()
        except LoraServerError as error:
            failed(error)
        except Exception:
            _log.exception("adapters failed", request_id=job.request.request_id)
            self._fail(job, EngineFailureError(job.request.request_id))
        else:
            then(job, result)

    def _on_resolved(self, job: EngineJob, resolved: Any) -> None:
        job.resolve(resolved)
        if resolved:
            self._prefetch(resolved)

    def _on_acquired(self, job: EngineJob, lease: Any) -> None:
        self._parked.remove(job)
        job.lease = lease
        self._leased.append(job)

    def _announce_positions(self) -> None:
        for position, job in enumerate(self):
            job.log.publish(QueuedEvent(position))


def _give_back(future: Future[Any]) -> None:
    try:
        release = getattr(future.result(), "release", None)
    except (CancelledError, Exception):
        return
    if release is not None:
        release()

"""From accepted to startable: the waiting line, and the adapters that each job in it still needs.

A job enters the line at once and stays there until its last image has begun. Its adapters are resolved, and with that
prefetched, while others step; a job that is not ready is passed over, so a cold adapter delays only the request that
wants it. Whoever is next takes its leases, all or none; if it has to wait for them, others go first. If a version is
gone by then, because its name has got another one meanwhile, the request is resolved once more. Engine thread only.
"""

from __future__ import annotations

import time
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
from lora_server.scheduler.queue import FairQueue
from lora_server.types import QueuedEvent

_log = structlog.get_logger(__name__)

_GONE = AdapterError
"""How the lease of a version fails that was there when the request was resolved: it is gone, replaced, half-written."""

_ANNOUNCE_S = 0.25
"""How often positions are told, at most: each is a message to each caller that waits."""

_ATTEMPTS = 4
"""How often a request may find, when its turn comes, that its names mean something else by now."""


class Admission:
    """Jobs with images that have not begun.

    | a job in the line is | when |
    |---|---|
    | pending, not resolved | its adapters are being resolved |
    | pending, resolved | its turn has come, and its leases have not |
    | not pending, without a lease | it is ready and waits for its turn |
    | not pending, with a lease | its next image begins as soon as there is a place |
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
        self._line: FairQueue[EngineJob] = FairQueue()
        self._announced_s = 0.0
        self._moved = False

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[EngineJob]:
        """Yields the jobs of which no image has begun, in the order of their turns; a snapshot."""
        return iter([job for job in self._line if not job.begun])

    def enter(self, job: EngineJob) -> None:
        """Puts *job* into the line and begins to resolve its adapters."""
        self._line.push(job)
        self._moved = True
        self._tell(job, sum(not each.begun for each in self._line) - 1)
        self._wait_for(job, self._manager.resolve(job.request.adapters, job.tenant), self._on_resolved)

    def next(self, may_begin: Callable[[EngineJob], bool]) -> EngineJob | None:
        """Returns the job whose next image is to begin, with its lease; it stays in the line. None if none can.

        *may_begin* says whether there is a place for the next image of a job whose adapters are resolved.
        """
        while True:
            job = self._line.next(lambda waiting: waiting.pending is None and may_begin(waiting))
            if job is None or job.lease is not None:
                return job
            self._acquire(job, _ATTEMPTS)  # it has its lease, is pending or has left the line now

    def begin(self, job: EngineJob) -> None:
        """Notes that the next image of *job* begins; with the last one, it leaves the line."""
        self._line.begin(job, job.image_pixel_steps)
        job.images_to_begin -= 1
        if not job.images_to_begin:
            self._line.remove(job)
        self._moved = True

    def remove(self, job: EngineJob) -> None:
        """Forgets *job*; what it waited for is abandoned. Its lease is the caller's to release."""
        self._moved |= self._line.remove(job)
        if job.pending is not None:
            job.pending.cancel()
            job.pending = None

    def announce(self) -> None:
        """Tells those who wait how many are before them, if that has changed, and not too often."""
        now_s = time.monotonic()
        if not self._moved or now_s - self._announced_s < _ANNOUNCE_S:
            return
        self._moved, self._announced_s = False, now_s
        for position, job in enumerate(self):
            self._tell(job, position)

    def _tell(self, job: EngineJob, position: int) -> None:
        if job.position != position:
            job.position = position
            job.log.publish(QueuedEvent(position, job.expected_s))

    def _acquire(self, job: EngineJob, attempts: int) -> None:
        """Takes a job's leases; if a version is gone, asks once more what the request means."""
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
        job.lease = lease


def _give_back(future: Future[Any]) -> None:
    try:
        release = getattr(future.result(), "release", None)
    except (CancelledError, Exception):
        return
    if release is not None:
        release()

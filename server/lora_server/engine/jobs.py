"""Which jobs there are: admission, idempotency by request id, and results kept for retries.

Thread-safe; the only place where a request id is looked up.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from lora_server.config import EngineConfig
from lora_server.engine.holdings import Holdings
from lora_server.engine.job import EngineJob
from lora_server.engine.retained import RequestKey, Retained
from lora_server.errors import (
    FieldFault,
    InvalidRequestError,
    QueueFullError,
    ServerDrainingError,
    UnreadImagesError,
    WaitTooLongError,
)
from lora_server.scheduler.backlog import Backlog
from lora_server.scheduler.returns import Returns
from lora_server.scheduler.shares import Shares
from lora_server.scheduler.throughput import Throughput
from lora_server.types import GenerationRequest, QueueInfo

_GUESS_S = 1.0
"""When to come back while nothing was measured, or nothing of it helps."""
_ROOMY = 0.5
"""Share of its places, and of the wait that it may have, up to which a tenant has room for all who come back."""


def _key(request: GenerationRequest) -> RequestKey:
    """A request id belongs to its tenant: nobody joins, guesses or blocks another's."""
    return request.tenant, request.request_id


class JobTable:
    """Jobs by tenant and request id: those in flight, and finished ones for a while.

    | invariant | |
    |---|---|
    | `_waiting <= _in_flight` | both sets of jobs |
    | `_waiting_of` | how many of `_waiting` each tenant has; no tenant with none |
    | `_backlog` | what is left of the jobs in flight, as it was last noted |
    """

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float],
        throughput: Throughput | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        """*throughput* is what waits are estimated by; *holdings* says who has too many unread images."""
        self._config = config
        self._clock = clock
        self._throughput = throughput or Throughput()
        self._holdings = holdings or Holdings(Shares.by(config.max_unread_bytes, config.tenant_share))
        total = config.max_queued_requests
        self._places = Shares.by(total, config.tenant_share)
        if config.max_queued_per_tenant is not None:
            self._places = Shares(total, min(total, config.max_queued_per_tenant))
        self._lock = threading.Lock()
        self._in_flight: dict[RequestKey, EngineJob] = {}
        self._waiting: set[RequestKey] = set()
        self._waiting_of: Counter[str] = Counter()
        self._backlog = Backlog()
        self._returns = Returns()
        self._retained = Retained(config.result_retention_s, config.max_retained_bytes, clock)
        self._draining = False
        self.finished_requests = self.failed_requests = self.finished_images = 0

    def enter(self, request: GenerationRequest, create: Callable[[], EngineJob]) -> tuple[EngineJob, bool]:
        """Returns (the job for this request, whether it is new); a place for its reader is reserved.

        Raises:
            InvalidRequestError: If the id belongs to a job that draws something else.
            QueueFullError: If the job would be new, and too many wait, of all or of its tenant, or it would have to
                wait for too long, or its tenant leaves too many images unread.
            ServerDrainingError: If the job would be new and the engine takes no new work.
        """
        key = _key(request)
        with self._lock:
            known = self._in_flight.get(key) or self._retained.get(key)
            if known is not None:
                _check_same(known.request, request)
            if known is not None and known.log.reserve():
                known.extend_deadline(request.deadline_s)
                return known, False
            if self._draining:
                raise ServerDrainingError()
            expected_s = self._check_room(request)
            job = create()
            job.expected_s = expected_s
            job.log.reserve()
            self._in_flight[key] = job
            self._waiting.add(key)
            self._waiting_of[request.tenant] += 1
            self._backlog.put(request.tenant, key, job.remaining_pixel_steps)
            return job, True

    def started(self, job: EngineJob) -> None:
        """Notes that *job* does not wait any more."""
        with self._lock:
            if self._in_flight.get(_key(job.request)) is job:
                self._wait_no_more(job)

    def progressed(self, jobs: Iterable[EngineJob]) -> None:
        """Notes what is left of *jobs*."""
        with self._lock:
            for job in jobs:
                key = _key(job.request)
                if self._in_flight.get(key) is job:
                    self._backlog.put(job.tenant, key, job.remaining_pixel_steps)

    def leave(self, job: EngineJob, *, keep: bool) -> bool:
        """Takes *job* out of flight; with *keep*, its result is held for retries. Idempotent.

        Returns whether it was in flight, which is so once for each job.
        """
        with self._lock:
            key = _key(job.request)
            if self._in_flight.get(key) is not job:
                return False
            del self._in_flight[key]
            self._wait_no_more(job)
            self._backlog.remove(job.tenant, key)
            self.finished_requests += keep
            self.failed_requests += not keep
            self.finished_images += keep * job.request.parameters.num_images
            if keep:
                self._retained.put(key, job)
            return True

    def drain(self) -> None:
        """Takes no new jobs from now on; retries of known ones still join. Idempotent."""
        with self._lock:
            self._draining = True

    def info(self) -> QueueInfo:
        """Returns how many jobs wait and run."""
        with self._lock:
            self._retained.forget_old()
            waiting = len(self._waiting)
            return QueueInfo(
                queued_requests=waiting,
                running_requests=len(self._in_flight) - waiting,
                max_queued_requests=self._places.total,
                max_queued_per_tenant=self._places.of_a_tenant,
                waiting_tenants=len(self._waiting_of),
                estimated_wait_s=self._throughput.seconds(self._backlog.total),
                unread_bytes=self._holdings.used_bytes,
                max_unread_bytes=self._holdings.max_bytes,
                retained_bytes=self._retained.used_bytes,
            )

    def in_flight(self) -> list[EngineJob]:
        """Returns the jobs that are neither finished nor failed."""
        with self._lock:
            return list(self._in_flight.values())

    def _check_room(self, request: GenerationRequest) -> float | None:
        """Returns the seconds after which the request should be done; raises QueueFullError if it is not let in."""
        tenant = request.tenant
        waiting, own = len(self._waiting), self._waiting_of[tenant]
        if not self._places.has_room(own, waiting):
            lines = len(self._waiting_of) if own >= self._places.of_a_tenant else 1
            raise QueueFullError(
                self._places.total,
                self._retry_after_s(tenant, self._mean_s() * lines),
                max_queued_per_tenant=self._places.of_a_tenant if own >= self._places.of_a_tenant else None,
            )
        if not self._holdings.has_room(tenant):
            retry_after_s = self._retry_after_s(tenant, _GUESS_S)
            raise UnreadImagesError(self._holdings.bytes_of(tenant), self._holdings.max_tenant_bytes, retry_after_s)
        return self._check_wait(request)

    def _check_wait(self, request: GenerationRequest) -> float | None:
        """Returns the same; raises WaitTooLongError if too much comes before the request, or it would come too late.

        What is promised holds as well if others come and share its steps in a batch.
        """
        wanted = request.parameters
        work = wanted.width_px * wanted.height_px * wanted.num_inference_steps * wanted.num_images
        expected_s = self._throughput.seconds(self._backlog.until_done(request.tenant, work))
        own_s = self._throughput.seconds(work)
        if expected_s is None or own_s is None:
            return None
        wait_s, limit_s, now_s = expected_s - own_s, self._config.max_expected_wait_s, self._clock()
        if wait_s and request.deadline_s is not None:
            limit_s = min(limit_s, max(1e-3, request.deadline_s - now_s - own_s))
        if wait_s > limit_s:
            retry_after_s = self._retry_after_s(request.tenant, max(self._mean_s(), wait_s - limit_s))
            raise WaitTooLongError(wait_s, limit_s, retry_after_s)
        if max(wait_s / limit_s, self._waiting_of[request.tenant] / self._places.of_a_tenant) <= _ROOMY:
            self._returns.forget(request.tenant)
        return max(expected_s, own_s * max(1.0, self._config.max_batch_images / wanted.num_images))

    def _retry_after_s(self, tenant: str, turn_s: float) -> float:
        drained_s = self._throughput.seconds(self._backlog.total) or 0.0
        return self._returns.after_s(tenant, self._clock(), turn_s, drained_s)

    def _mean_s(self) -> float:
        """The mean time after which a request ends, and with that one starts."""
        work_s = self._throughput.seconds(self._backlog.total)
        return _GUESS_S if work_s is None else work_s / max(1, len(self._in_flight))

    def _wait_no_more(self, job: EngineJob) -> None:
        key = _key(job.request)
        if key in self._waiting:
            self._waiting.remove(key)
            self._waiting_of[job.tenant] -= 1
            if not self._waiting_of[job.tenant]:
                del self._waiting_of[job.tenant]


def _check_same(known: GenerationRequest, other: GenerationRequest) -> None:
    def content(request: GenerationRequest) -> tuple[object, ...]:
        return request.parameters, request.adapters, request.format

    if content(known) != content(other):
        fault = FieldFault("request_id", "belongs to another request; choose a new one")
        raise InvalidRequestError([fault])

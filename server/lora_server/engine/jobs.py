"""Which jobs there are: admission by count, idempotency by request id, and results kept for retries.

Thread-safe; the only place where a request id is looked up.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from lora_server.config import EngineConfig
from lora_server.engine.job import EngineJob
from lora_server.errors import FieldFault, InvalidRequestError, QueueFullError, ServerDrainingError
from lora_server.scheduler.throughput import Throughput
from lora_server.types import GenerationRequest, QueueInfo

_Key = tuple[str, str]


def _key(request: GenerationRequest) -> _Key:
    """A request id belongs to its tenant: nobody joins, guesses or blocks another's."""
    return request.tenant, request.request_id


class JobTable:
    """Jobs by tenant and request id: those in flight, and finished ones for a while.

    | invariant | |
    |---|---|
    | `_waiting <= _in_flight` | both sets of jobs |
    | `_waiting_of` | how many of `_waiting` each tenant has; no tenant with none |
    | `_retained_bytes` | sum of the images of `_retained`, at most the configured bound |
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float], throughput: Throughput | None = None) -> None:
        """*throughput* is what the waits of refused requests are estimated by."""
        self._config = config
        self._clock = clock
        self._throughput = throughput or Throughput()
        self._max_per_tenant = config.max_queued_per_tenant or config.max_queued_requests
        self._lock = threading.Lock()
        self._in_flight: dict[_Key, EngineJob] = {}
        self._waiting: set[_Key] = set()
        self._waiting_of: Counter[str] = Counter()
        self._retained: OrderedDict[_Key, tuple[float, int, EngineJob]] = OrderedDict()
        self._retained_bytes = 0
        self._draining = False
        self.finished_requests = self.failed_requests = self.finished_images = 0

    def enter(self, request: GenerationRequest, create: Callable[[], EngineJob]) -> tuple[EngineJob, bool]:
        """Returns (the job for this request, whether it is new); a place for its reader is reserved.

        Raises:
            InvalidRequestError: If the id belongs to a job that draws something else.
            QueueFullError: If the job would be new and too many wait, of all or of its tenant.
            ServerDrainingError: If the job would be new and the engine takes no new work.
        """
        with self._lock:
            self._forget_old()
            known = self._known(_key(request))
            if known is not None:
                _check_same(known.request, request)
            if known is not None and known.log.reserve():
                known.extend_deadline(request.deadline_s)
                return known, False
            if self._draining:
                raise ServerDrainingError()
            self._check_room(request.tenant)
            job = create()
            job.log.reserve()
            self._in_flight[_key(request)] = job
            self._waiting.add(_key(request))
            self._waiting_of[request.tenant] += 1
            return job, True

    def started(self, job: EngineJob) -> None:
        """Notes that *job* does not wait any more."""
        with self._lock:
            if self._in_flight.get(_key(job.request)) is job:
                self._wait_no_more(job)

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
            self.finished_requests += keep
            self.failed_requests += not keep
            self.finished_images += keep * job.request.parameters.num_images
            if keep and self._config.result_retention_s > 0:
                self._retain(job)
            return True

    def drain(self) -> None:
        """Takes no new jobs from now on; retries of known ones still join. Idempotent."""
        with self._lock:
            self._draining = True

    def info(self) -> QueueInfo:
        """Returns how many jobs wait and run."""
        with self._lock:
            waiting = len(self._waiting)
            return QueueInfo(
                queued_requests=waiting,
                running_requests=len(self._in_flight) - waiting,
                max_queued_requests=self._config.max_queued_requests,
                max_queued_per_tenant=self._max_per_tenant,
                waiting_tenants=len(self._waiting_of),
                estimated_wait_s=self._throughput.seconds(self._work()),
            )

    def in_flight(self) -> list[EngineJob]:
        """Returns the jobs that are neither finished nor failed."""
        with self._lock:
            return list(self._in_flight.values())

    def _check_room(self, tenant: str) -> None:
        """Raises QueueFullError if no more requests, or no more of *tenant*, may wait."""
        full = len(self._waiting) >= self._config.max_queued_requests
        if not full and self._waiting_of[tenant] < self._max_per_tenant:
            return
        lines = 1 if full else len(self._waiting_of)
        retry_after_s = self._throughput.retry_after_s(self._work(), len(self._in_flight), lines)
        raise QueueFullError(
            self._config.max_queued_requests,
            retry_after_s,
            max_queued_per_tenant=None if full else self._max_per_tenant,
        )

    def _work(self) -> int:
        return sum(job.remaining_pixel_steps for job in self._in_flight.values())

    def _wait_no_more(self, job: EngineJob) -> None:
        key = _key(job.request)
        if key in self._waiting:
            self._waiting.remove(key)
            self._waiting_of[job.tenant] -= 1
            if not self._waiting_of[job.tenant]:
                del self._waiting_of[job.tenant]

    def _known(self, key: _Key) -> EngineJob | None:
        retained = self._retained.get(key)
        return self._in_flight.get(key) or (retained[2] if retained else None)

    def _retain(self, job: EngineJob) -> None:
        size_bytes = job.log.size_bytes
        if size_bytes > self._config.max_retained_bytes:
            return
        expire_s = self._clock() + self._config.result_retention_s
        self._retained[_key(job.request)] = (expire_s, size_bytes, job)
        self._retained_bytes += size_bytes
        self._forget_old()

    def _forget_old(self) -> None:
        """Drops results that are too old, then the oldest while there are too many bytes."""
        now_s = self._clock()
        while self._retained:
            expire_s, size_bytes, _ = next(iter(self._retained.values()))
            if expire_s > now_s and self._retained_bytes <= self._config.max_retained_bytes:
                return
            self._retained.popitem(last=False)
            self._retained_bytes -= size_bytes


def _check_same(known: GenerationRequest, other: GenerationRequest) -> None:
    def content(request: GenerationRequest) -> tuple[object, ...]:
        return request.parameters, request.adapters, request.format

    if content(known) != content(other):
        fault = FieldFault("request_id", "belongs to another request; choose a new one")
        raise InvalidRequestError([fault])

"""Which jobs there are: admission by count, idempotency by request id, and results kept for retries.

Thread-safe; the only place where a request id is looked up.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from lora_server.config import EngineConfig
from lora_server.engine.job import EngineJob
from lora_server.errors import FieldFault, InvalidRequestError, QueueFullError, ServerDrainingError
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
    | `_retained_bytes` | sum of the images of `_retained`, at most the configured bound |
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[_Key, EngineJob] = {}
        self._waiting: set[_Key] = set()
        self._retained: OrderedDict[_Key, tuple[float, int, EngineJob]] = OrderedDict()
        self._retained_bytes = 0
        self._draining = False

    def enter(self, request: GenerationRequest, create: Callable[[], EngineJob]) -> tuple[EngineJob, bool]:
        """Returns (the job for this request, whether it is new); a place for its reader is reserved.

        Raises:
            InvalidRequestError: If the id belongs to a job that draws something else.
            QueueFullError: If the job would be new and too many wait.
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
            if len(self._waiting) >= self._config.max_queued_requests:
                raise QueueFullError(self._config.max_queued_requests)
            job = create()
            job.log.reserve()
            self._in_flight[_key(request)] = job
            self._waiting.add(_key(request))
            return job, True

    def started(self, job: EngineJob) -> None:
        """Notes that *job* does not wait any more."""
        with self._lock:
            if self._in_flight.get(_key(job.request)) is job:
                self._waiting.discard(_key(job.request))

    def leave(self, job: EngineJob, *, keep: bool) -> None:
        """Takes *job* out of flight; with *keep*, its result is held for retries. Idempotent."""
        with self._lock:
            key = _key(job.request)
            if self._in_flight.get(key) is not job:
                return
            del self._in_flight[key]
            self._waiting.discard(key)
            if keep and self._config.result_retention_s > 0:
                self._retain(job)

    def drain(self) -> None:
        """Takes no new jobs from now on; retries of known ones still join. Idempotent."""
        with self._lock:
            self._draining = True

    def info(self) -> QueueInfo:
        """Returns how many jobs wait and run."""
        with self._lock:
            waiting = len(self._waiting)
            return QueueInfo(waiting, len(self._in_flight) - waiting, self._config.max_queued_requests)

    def in_flight(self) -> list[EngineJob]:
        """Returns the jobs that are neither finished nor failed."""
        with self._lock:
            return list(self._in_flight.values())

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

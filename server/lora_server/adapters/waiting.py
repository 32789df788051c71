"""Those who wait for leases or pins of others to end: a list of attempts, tried again whenever something is let go.

Nobody waits on a thread. Attempts run with the manager's lock held, futures are completed without it.

| invariant | |
|---|---|
| an attempt that has had its result, or was given up | is never tried again, however many threads retry at once |
| an attempt in the list | was blocked when last tried; whoever lets something go retries it |
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from lora_server.adapters.futures import complete, fail, when_cancelled
from lora_server.errors import ServerDrainingError

_log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Attempt:
    """One who waits; *settled*, guarded by the lock, says that nothing is to be tried any more."""

    action: Callable[[], Any]
    future: Future[Any]
    undo: Callable[[Any], None]
    settled: bool = False


class WaitingList:
    """Attempts that were blocked, the longest waiting first."""

    def __init__(self, lock: threading.RLock) -> None:
        """Attempts run under *lock*, which the list shares with what they change."""
        self._lock = lock
        self._blocked: list[_Attempt] = []
        self._closed = False
        self._retrying = self._again = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._blocked)

    def complete_when_possible(
        self, attempt: Callable[[], T | None], future: Future[T], undo: Callable[[T], None] = lambda _: None
    ) -> None:
        """Completes *future* with what *attempt* returns, now or later; None from it means: blocked, try again.

        A result that comes after the future was cancelled is undone; a future that is cancelled while it waits leaves
        the list at once. Whatever the attempt raises fails the future.
        """
        waiter = _Attempt(attempt, future, undo)
        self._try(waiter)
        when_cancelled(future, lambda: self._give_up(waiter))

    def retry(self) -> None:
        """Gives everybody another try; call it after letting something go, without the lock held.

        If another thread, or a caller further up, is at it already, that one goes round once more.
        """
        with self._lock:
            self._again = True
            if self._retrying:
                return
            self._retrying = True
        while waiting := self._next_round():
            for waiter in waiting:
                self._try(waiter)

    def _next_round(self) -> list[_Attempt]:
        with self._lock:
            waiting = list(self._blocked) if self._again else []
            self._again = False
            self._retrying = bool(waiting)
            return waiting

    def close(self) -> None:
        """Fails everybody who waits, now and later, with ServerDrainingError."""
        with self._lock:
            self._closed = True
        self.retry()

    def _try(self, waiter: _Attempt) -> None:
        result: Any = None
        error: Exception | None = None
        with self._lock:
            if waiter.settled:
                return
            if self._closed:
                error = ServerDrainingError()
            elif not waiter.future.cancelled():
                try:
                    result = waiter.action()
                except Exception as caught:  # also what is no domain error: who retries is somebody else
                    error = caught
                if result is None and error is None:
                    if waiter not in self._blocked:
                        self._blocked.append(waiter)
                    return
            self._settle(waiter)
        if error is not None:
            fail(waiter.future, error)
        elif result is not None and not complete(waiter.future, result):
            try:
                waiter.undo(result)
            except Exception:  # or nobody would ever be tried again
                _log.exception("undoing failed")

    def _give_up(self, waiter: _Attempt) -> None:
        with self._lock:
            self._settle(waiter)

    def _settle(self, waiter: _Attempt) -> None:
        waiter.settled = True
        if waiter in self._blocked:
            self._blocked.remove(waiter)

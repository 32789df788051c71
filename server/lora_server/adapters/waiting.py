"""Those who wait for leases or pins of others to end: a list of attempts, tried again whenever something is let go.

Nobody waits on a thread. Attempts run with the manager's lock held, futures are completed without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lora_server.adapters.futures import complete, fail
from lora_server.errors import LoraServerError, ServerDrainingError

T = TypeVar("T")


class WaitingList:
    """Attempts that were blocked, the longest waiting first."""

    def __init__(self, lock: threading.RLock) -> None:
        """Attempts run under *lock*, which the list shares with what they change."""
        self._lock = lock
        self._blocked: list[Callable[[], bool]] = []
        self._closed = False

    def complete_when_possible(
        self, attempt: Callable[[], T | None], future: Future[T], undo: Callable[[T], None] = lambda _: None
    ) -> None:
        """Completes *future* with what *attempt* returns, now or later; None from it means: blocked, try again.

        A result that comes after the future was cancelled is undone. A domain error fails the future.
        """

        def run() -> bool:
            if future.cancelled():
                return True
            if self._closed:
                fail(future, ServerDrainingError())
                return True
            try:
                with self._lock:
                    result = attempt()
                    if result is None and run not in self._blocked:
                        self._blocked.append(run)
            except LoraServerError as error:
                fail(future, error)
                return True
            if result is None:
                return False
            if not complete(future, result):
                undo(result)
            return True

        run()

    def retry(self) -> None:
        """Gives everybody another try; call it after letting something go, without the lock held."""
        with self._lock:
            waiting = list(self._blocked)
        for run in waiting:
            if run():
                with self._lock:
                    if run in self._blocked:
                        self._blocked.remove(run)

    def close(self) -> None:
        """Fails everybody who waits, now and later, with ServerDrainingError."""
        self._closed = True
        self.retry()

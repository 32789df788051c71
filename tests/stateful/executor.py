"""An executor without threads: what was submitted runs when, and in the order that, a test decides."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Tasks:
    """Everything that was submitted to any of its executors and has not run."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def run(self, place: int) -> None:
        """Runs one task, to its end."""
        self._waiting.pop(place % len(self._waiting))()

    def run_all(self) -> None:
        """Runs tasks until there are none, the oldest first."""
        while self._waiting:
            self.run(0)

    def pool(self, threads: int, name: str) -> Executor:
        """Makes an executor, as `reads.thread_pool` does."""
        return _Executor(self._waiting)


class _Executor(Executor):
    def __init__(self, waiting: list[Callable[[], None]]) -> None:
        self._waiting = waiting
        self._mine: list[Future[Any]] = []
        self._stopped = False

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._stopped:
            raise RuntimeError("shut down")
        future: Future[Any] = Future()
        self._mine.append(future)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._waiting.append(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._stopped = True
        if cancel_futures:
            for future in self._mine:
                future.cancel()

"""Work that blocks on the disk, on threads of its own: looking at folders (resolvers) and reading them (loaders).

Owns both pools, and that concurrent reads of one content are one read. Knows nothing of names, caches or versions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_server.adapters.api import LoadedAdapter, Loader
from lora_server.adapters.futures import chain, fail, when_cancelled, when_done
from lora_server.adapters.settling import QUIET_S, settled
from lora_server.adapters.source import Signature
from lora_server.errors import AdapterChangingError, ServerDrainingError

_RESOLVER_THREADS = 4
_FETCHER_THREADS = 2
_TRIES = 3

T = TypeVar("T")
Pool = Callable[[int, str], Executor]
"""Makes an executor of so many threads, whose names begin so."""


def thread_pool(threads: int, name: str) -> Executor:
    """The pool of a true server."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


@dataclass(slots=True, eq=False)
class Reading:
    """One read, and how many wait for what follows it; the future is shared, and never cancelled by one of them."""

    future: Future[LoadedAdapter]
    followers: int = 0


class Reads:
    """Reads in flight. Thread-safe; no method blocks but `close`."""

    def __init__(self, loader: Loader, loader_threads: int, lock: threading.RLock, pool: Pool = thread_pool) -> None:
        """*lock* guards the books of what is being read; the manager shares its own."""
        self._loader = loader
        self._lock = lock
        self._in_flight: dict[tuple[Path, Signature, bool], Reading] = {}
        self._started = 0
        self._loaders = pool(loader_threads, "loader")
        # Apart from the loaders, so that a request whose adapters are warm never queues behind a cold one.
        self._resolvers = pool(_RESOLVER_THREADS, "resolver")
        # And these apart from both: a download takes minutes.
        self._fetchers = pool(_FETCHER_THREADS, "fetcher")

    def __len__(self) -> int:
        with self._lock:
            return sum(not reading.future.done() for reading in self._in_flight.values())

    @property
    def started(self) -> int:
        """How many reads were begun since the start."""
        return self._started

    def resolve(self, work: Callable[[], Future[T]], undo: Callable[[T], None] = lambda _: None) -> Future[T]:
        """Runs *work* on a resolver thread; its result's result is the returned future's. Not begun if cancelled.

        What comes after it was cancelled goes to *undo*.
        """
        into: Future[T] = Future()
        try:
            working = self._resolvers.submit(work)
        except RuntimeError:  # the pool is shut down
            fail(into, ServerDrainingError())
            return into
        when_cancelled(into, working.cancel)
        return chain(working, lambda started: started, into, undo)

    def fetch(self, work: Callable[[], T]) -> Future[T]:
        """Runs *work*, which waits for a network, on a thread of its own kind; not begun if cancelled."""
        try:
            return self._fetchers.submit(work)
        except RuntimeError:  # the pool is shut down
            refused: Future[T] = Future()
            fail(refused, ServerDrainingError())
            return refused

    def join(
        self, folder: Path, signature: Signature, *, allow_partial: bool = False, changed: bool = False
    ) -> Reading:
        """Reads a folder on a loader thread, or joins a read of the same content; to be followed by `follow`.

        *allow_partial* leaves out tensors whose module the model has not. A folder that has *changed* since it was
        read last is left alone for a moment first, because somebody may be at it. Who looks first whether the content
        is cached holds the lock from then to here: a read ends for others only when what followed it is done, so that
        there is no moment at which it is neither being read nor cached.

        Raises:
            ServerDrainingError: If the threads are stopped.
        """
        key = (folder, signature, allow_partial)
        with self._lock:
            reading = self._in_flight.get(key)
            if reading is None:
                try:
                    reading = Reading(self._loaders.submit(self._read, folder, signature, allow_partial, changed))
                except RuntimeError as error:
                    raise ServerDrainingError() from error
                self._started += 1
                self._in_flight[key] = reading
            reading.followers += 1
        return reading

    def follow(self, reading: Reading, then: Callable[[LoadedAdapter], Future[T] | T]) -> Future[T]:
        """Passes what is read through *then*; the returned future is the caller's alone, and may be cancelled."""
        into: Future[T] = Future()
        when_done(into, lambda _: self._leave(reading))
        return chain(reading.future, then, into)

    def is_reading(self, folder: Path, signature: Signature | None = None) -> bool:
        """Whether *folder* is being read, or waits to be cached; with *signature*, whether that content of it is."""
        with self._lock:
            if signature is not None:
                return any((folder, signature, partial) in self._in_flight for partial in (False, True))
            return any(each == folder for each, *_ in self._in_flight)

    def close(self) -> None:
        """Stops the threads; what has not begun is cancelled. Blocks for running reads."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)  # a download is not worth waiting for
        self._resolvers.shutdown(wait=True, cancel_futures=True)
        self._loaders.shutdown(wait=True, cancel_futures=True)

    def _read(self, folder: Path, signature: Signature, allow_partial: bool, changed: bool) -> LoadedAdapter:
        load = self._loader.load_partial if allow_partial else self._loader.load
        if not changed and (loaded := load(folder)).signature == signature:
            return loaded
        for _ in range(_TRIES):
            quiet = settled(lambda: self._loader.signature(folder), QUIET_S, folder.name)
            loaded = load(folder)
            if loaded.signature == quiet:  # else somebody has begun to write meanwhile
                return loaded
        raise AdapterChangingError(folder.name)

    def _leave(self, reading: Reading) -> None:
        with self._lock:
            reading.followers -= 1
        if not reading.followers:  # once the read itself has ended
            when_done(reading.future, lambda _: self._forget(reading))

    def _forget(self, reading: Reading) -> None:
        with self._lock:
            if not reading.followers:
                for key in [key for key, each in self._in_flight.items() if each is reading]:
                    del self._in_flight[key]

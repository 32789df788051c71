"""Writes changes of the registry to the state file, on a thread of its own, so that nobody waits for a disk in a lock.

Who changed something asks for `saved()` and acknowledges when that is done; what changes meanwhile goes into the same
transaction. Knows nothing of documents: it is told how to make them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import structlog

from lora_server.adapters.futures import complete, fail
from lora_server.adapters.state import Document, StateFile
from lora_server.errors import StateNotSavedError

_log = structlog.get_logger(__name__)


class Journal:
    """Changes that are to be written. Thread-safe; only `close` blocks."""

    def __init__(
        self,
        file: StateFile,
        lock: threading.RLock,
        document_of: Callable[[str], Document | None],
        on_saved: Callable[[Mapping[str, Document | None]], None],
    ) -> None:
        """*document_of* a name, None if it is gone, is called with *lock* held.

        *on_saved*, which may block, is told what was written before those who wait hear of it.
        """
        self._file = file
        self._lock = lock
        self._document_of = document_of
        self._on_saved = on_saved
        self._changed = threading.Condition()
        self._dirty: set[str] = set()
        self._waiting: list[Future[None]] = []
        self._failed = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="journal", daemon=True)
        self._thread.start()

    def note(self, name: str) -> None:
        """Notes that what is registered under *name* has changed; never blocks."""
        with self._changed:
            self._dirty.add(name)
            self._failed = False
            self._changed.notify()

    def saved(self) -> Future[None]:
        """Returns a future that is done when all that was noted before is durable.

        It fails with StateNotSavedError if it cannot be written; who asks next, or changes something, tries again.
        """
        waiting: Future[None] = Future()
        with self._changed:
            if self._closed:
                fail(waiting, StateNotSavedError("the server is shutting down"))
                return waiting
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting

    def close(self) -> None:
        """Writes what is noted and ends the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._file.close()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                closed = self._closed
            with self._lock, self._changed:
                names, self._dirty = self._dirty, set()
                waiting, self._waiting = self._waiting, []
                changes = {name: self._document_of(name) for name in sorted(names)}
            self._write(changes, waiting)
            if closed:
                return

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or (self._dirty and not self._failed))

    def _write(self, changes: dict[str, Document | None], waiting: list[Future[None]]) -> None:
        try:
            if changes:
                self._file.write(changes)
        except Exception as error:  # a thread's border
            _log.error("the state was not saved", error=str(error))
            with self._changed:  # for whoever asks next, or for the next change
                self._dirty |= set(changes)
                self._failed = True
            for each in waiting:
                fail(each, StateNotSavedError(str(error)))
            return
        if changes:
            try:
                self._on_saved(changes)
            except OSError as error:
                _log.warning("the store was not swept", error=str(error))
        for each in waiting:
            complete(each, None)

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
from lora_server.adapters.state import Document, StateFile, text_of
from lora_server.errors import StateNotSavedError

_log = structlog.get_logger(__name__)
_RETRY_S = 2.0
"""After which what could not be written is tried again, though nobody asks."""


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
        self._refused: dict[str, Exception] = {}
        self._untold: dict[str, Exception] = {}
        self._noted = self._failed = self._closed = False
        self._thread = threading.Thread(target=self._main, name="journal", daemon=True)
        self._thread.start()

    def note(self, name: str) -> None:
        """Notes that what is registered under *name* has changed; never blocks."""
        with self._changed:
            self._dirty.add(name)
            self._noted = True
            self._changed.notify()

    def saved(self) -> Future[None]:
        """Returns a future that is done when all that was noted before is durable.

        It fails with StateNotSavedError if it cannot be written. Whoever asks next, or changes something, tries again,
        and so does the journal itself every 2 s.
        """
        waiting: Future[None] = Future()
        with self._changed:
            if self._closed:
                fail(waiting, StateNotSavedError("the server is shutting down"))
                return waiting
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting

    @property
    def num_unsaved(self) -> int:
        """How many names have changes that could not be written."""
        with self._changed:
            return len(self._refused) + (len(self._dirty) if self._failed else 0)

    def close(self) -> None:
        """Writes what is noted and ends the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._file.close()

    def _main(self) -> None:
        while not self._closed:
            try:
                self._round()
            except Exception:  # a thread's border: it lives as long as the server
                _log.exception("the journal failed")
        self._round()  # what came while the last one was written

    def _round(self) -> None:
        """Waits for something to do, or for the next try after a failure, and writes it."""
        with self._changed:
            self._changed.wait_for(self._has_work, _RETRY_S if self._failed and self._dirty else None)
        with self._lock, self._changed:
            names, self._dirty, self._noted = self._dirty, set(), False
            waiting, self._waiting = self._waiting, []
            changes, refused = self._documents(names)
        try:
            if changes:
                self._file.write(changes)
            self._on_success(changes, refused, waiting)
        except Exception as error:  # whatever it is, who waits hears of it
            self._on_failure(changes, error, waiting)

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or self._noted)

    def _documents(self, names: set[str]) -> tuple[dict[str, Document | None], dict[str, Exception]]:
        """The documents of *names*, and why there is none of some; what cannot be written holds up nothing else."""
        changes: dict[str, Document | None] = {}
        refused: dict[str, Exception] = {}
        for name in sorted(names):
            try:
                document = self._document_of(name)
                if document is not None:
                    text_of(document)
                name.encode()
                changes[name] = document
            except Exception as error:
                refused[name] = error
        return changes, refused

    def _on_failure(self, changes: dict[str, Document | None], error: Exception, waiting: list[Future[None]]) -> None:
        with self._changed:  # for whoever asks next, for the next change, or in a while
            self._dirty |= set(changes)
            told, self._failed = self._failed, True
        if not told or waiting:
            _log.error("the state was not saved", error=str(error), changes=len(changes))
        for each in waiting:
            fail(each, StateNotSavedError(str(error)))

    def _on_success(
        self, changes: dict[str, Document | None], refused: dict[str, Exception], waiting: list[Future[None]]
    ) -> None:
        with self._changed:
            failed, self._failed = self._failed and bool(changes), False
            self._refused = {name: why for name, why in self._refused.items() if name not in changes} | refused
            self._untold = {name: why for name, why in self._untold.items() if name not in changes} | refused
            untold, self._untold = self._untold, {} if waiting else self._untold
        if failed:
            _log.info("the state is saved again", changes=len(changes))
        for name, why in refused.items():
            _log.error("an adapter's state cannot be written", adapter=name, error=repr(why))
        if changes:
            try:
                self._on_saved(changes)
            except Exception as error:
                _log.warning("the store was not swept", error=repr(error))
        for each in waiting:
            if untold:  # whoever asks next is who has changed it, or asks as soon
                name, why = next(iter(untold.items()))
                fail(each, StateNotSavedError(f"adapter {name!r}: {why!r}"))
            else:
                complete(each, None)

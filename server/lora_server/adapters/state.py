"""The state file: what is registered, as documents by name, in SQLite. Knows nothing of what the documents say.

WAL with synchronous=FULL: a transaction that has been committed survives a crash of the machine. The folder is locked
by its owner (`store.lock_directory`); not thread-safe, one thread at a time.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_VERSION = 1
Document = dict[str, Any]


class StateDamagedError(OSError):
    """The state file cannot be read."""


class PinLostError(OSError):
    """A pin of the state cannot be satisfied, and the operator wants all of them."""

    def __init__(self, adapter: str, why: str) -> None:
        super().__init__(
            f"the pin of adapter {adapter!r} cannot be satisfied: {why} "
            "Bring its files back, or start without --strict-pins and unpin it."
        )


class StateFile:
    """Documents by name."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            StateDamagedError: If it is no state file, or one of a later release; nothing is changed.
            OSError: If it cannot be opened or written.
        """
        self._path = path
        try:
            self._db: sqlite3.Connection | None = self._connect()
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found > _VERSION:
                raise self._damaged(f"it is of a later release, version {found}")
            self.is_new = not found
            self._set_up()
        except sqlite3.OperationalError as error:  # of the disk, not of the content
            raise OSError(f"the state file {path} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def begin(self) -> None:
        """Makes a new file one that is not new any more; to be called once all that it does not name is safe.

        Raises:
            OSError: If it cannot be written.
        """
        try:
            self._connected().execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as error:
            raise OSError(f"the state file {self._path} cannot be written: {error}") from error

    def read(self) -> dict[str, Document]:
        """Returns all documents by name.

        Raises:
            StateDamagedError: If they cannot be read.
        """
        try:
            rows = self._connected().execute("SELECT name, document FROM adapters ORDER BY name").fetchall()
            return {name: json.loads(document) for name, document in rows}
        except (sqlite3.Error, ValueError, RecursionError) as error:
            raise self._damaged(error) from error

    def write(self, changes: Mapping[str, Document | None]) -> None:
        """Replaces documents, or removes those that are None; all or nothing, and durable when it returns.

        Raises:
            OSError: If it cannot be written; nothing is changed.
            TypeError, ValueError: If a document has what cannot be written; nothing is changed.
        """
        texts = {name: None if each is None else text_of(each) for name, each in changes.items()}
        try:
            db = self._connected()
            db.execute("BEGIN IMMEDIATE")
            for name, text in texts.items():
                if text is None:
                    db.execute("DELETE FROM adapters WHERE name = ?", (name,))
                else:
                    db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", (name, text))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo(error)
            raise OSError(f"the state file {self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Closes the file; idempotent."""
        self._disconnect()  # what was committed is safe

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            connection.execute("PRAGMA synchronous=FULL")  # of the connection, not of the file
            undo.pop_all()
        return connection

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = self._connect()
        return self._db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _set_up(self) -> None:
        db = self._connected()
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, document TEXT NOT NULL)")

    def _undo(self, error: sqlite3.Error) -> None:
        """Undoes a transaction, by leaving the connection unless the file is only busy: it may fail for good.

        The next transaction makes a new one, or says why there is none.
        """
        code = getattr(error, "sqlite_errorcode", None)  # errors of the module, not of SQLite, have none
        if self._db is not None and code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                return
        self._disconnect()

    def _damaged(self, why: object) -> StateDamagedError:
        return StateDamagedError(
            f"{self._path} cannot be read as a state file ({why}); move it away, with {self._path.name}-wal and "
            f"-shm, to start anew: what was uploaded is kept in {self._path.parent / 'quarantine'}"
        )


def text_of(document: Document) -> str:
    """A document as it is written; TypeError or ValueError if it has what cannot be."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False)

"""The state file: what is registered, as documents by name, in SQLite. Knows nothing of what the documents say.

WAL with synchronous=FULL: a transaction that has been committed survives a crash of the machine. The folder is locked
by its owner (`store.lock_directory`); not thread-safe, one thread at a time.
"""

from __future__ import annotations

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
            StateDamagedError: If it is no state file, or one of a later release.
        """
        self._path = path
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found > _VERSION:
                raise StateDamagedError(f"{path} is of a later release (version {found})")
            self._db.execute("CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, document TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def read(self) -> dict[str, Document]:
        """Returns all documents by name.

        Raises:
            StateDamagedError: If they cannot be read.
        """
        try:
            rows = self._db.execute("SELECT name, document FROM adapters ORDER BY name").fetchall()
            return {name: json.loads(document) for name, document in rows}
        except (sqlite3.DatabaseError, ValueError) as error:
            raise self._damaged(error) from error

    def write(self, changes: Mapping[str, Document | None]) -> None:
        """Replaces documents, or removes those that are None; all or nothing, and durable when it returns.

        Raises:
            OSError: If it cannot be written; nothing is changed.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for name, document in changes.items():
                    if document is None:
                        self._db.execute("DELETE FROM adapters WHERE name = ?", (name,))
                    else:
                        row = name, json.dumps(document, separators=(",", ":"))
                        self._db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", row)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise OSError(f"the state file {self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Closes the file; idempotent."""
        self._db.close()

    def _damaged(self, error: Exception) -> StateDamagedError:
        return StateDamagedError(f"{self._path} cannot be read as a state file ({error}); move it away to start anew")

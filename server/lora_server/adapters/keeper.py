"""What survives a restart: the state file, its journal, and the store's files, kept in step with the registry.

Without a state directory it keeps nothing, and everything is "saved" at once. Thread-safe.

| invariant | |
|---|---|
| a file of the store | is there as long as the registry or the state file names it, or somebody holds it |
| a document of the state file | names only files that are in the store |
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future

import structlog

from lora_server.adapters.api import Loader
from lora_server.adapters.books import Books
from lora_server.adapters.documents import document_of, record_of
from lora_server.adapters.futures import complete
from lora_server.adapters.incoming import FileEntry
from lora_server.adapters.journal import Journal
from lora_server.adapters.records import Record, StoredCopy
from lora_server.adapters.source import UPLOAD_SCHEME, FileBytes
from lora_server.adapters.state import Document, StateFile
from lora_server.adapters.store import ContentStore
from lora_server.errors import AdapterDigestMismatchError, AdapterSourceNotFoundError
from lora_server.types import Digest

_log = structlog.get_logger(__name__)


class Keeper:
    """Keeps records and files. No method blocks but `copy`, `release`, `restore` and `close`."""

    def __init__(
        self, lock: threading.RLock, loader: Loader, books: Books, store: ContentStore | None, file: StateFile | None
    ) -> None:
        """*lock* is the manager's; *store* and *file* are of one state directory, or both None."""
        self.store = store
        self._lock = lock
        self._loader = loader
        self._books = books
        self._file = file
        self._written: dict[str, set[Digest]] = {}
        self._journal: Journal | None = None

    def restore(self) -> list[Record]:
        """Registers what the state file has, sweeps the store, and begins to note changes; returns the records.

        Pins are to be satisfied yet. To be called once, before anything is registered.

        Raises:
            StateDamagedError: If the file cannot be understood.
        """
        if self._file is None:
            return []
        documents = self._file.read()
        if self._file.is_new:
            self._set_aside()
            self._file.begin()
        records = [record_of(name, document) for name, document in documents.items()]
        self._written = {name: _keys(document) for name, document in documents.items()}
        with self._lock:
            for record in records:
                self._settle(record)
                self._books.restore(record)
            self._books.expire_pins()
        self._journal = Journal(self._file, self._lock, self._document, self._on_written)
        self._books.on_change = self._journal.note
        self._sweep()
        return records

    def saved(self) -> Future[None]:
        """Returns a future that is done when all changes so far survive a crash; StateNotSavedError if they cannot."""
        if self._journal is not None:
            return self._journal.saved()
        done: Future[None] = Future()
        complete(done, None)
        return done

    def copies(self, record: Record) -> bool:
        """Whether a pin of *record* needs a copy of its files: not if they lie in the store anyway."""
        return self.store is not None and not record.source.path.startswith(UPLOAD_SCHEME)

    def copy(self, record: Record, digest: Digest) -> StoredCopy:
        """Copies the files of a record's version into the store, where they are held until `release`.

        Raises:
            AdapterDigestMismatchError: If the files are of another version by now.
            StoreFullError, DiskFullError, StorageFailedError: If they cannot be written.
        """
        assert self.store is not None
        with self._lock:
            stored, folder = record.stored, record.folder
        if stored is not None and stored.digest == digest:
            self.store.hold(stored.key)  # before it is looked for: else it could be swept in between
            if stored.key in self.store:
                return stored
            self.store.release(stored.key)
        files = self._loader.files(folder)
        if files.digest != digest:
            raise AdapterDigestMismatchError(record.name, digest, files.digest)
        bare = folder.is_file()
        contents = files.contents if bare else {**files.cards, **files.contents}
        return StoredCopy(self._put(record.name, contents, bare=bare), digest)

    def release(self, key: Digest) -> None:
        """Ends a hold on files of the store; what nobody needs is removed."""
        if self.store is not None:
            self.store.release(key)
            self._sweep()

    @property
    def num_unsaved(self) -> int:
        """How many changes could not be written yet."""
        return 0 if self._journal is None else self._journal.num_unsaved

    def close(self) -> None:
        """Writes what is noted; idempotent."""
        if self._journal is not None:
            self._journal.close()

    def _put(self, name: str, contents: Mapping[str, FileBytes], *, bare: bool) -> Digest:
        assert self.store is not None
        entries = [FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents.items()]
        with self.store.begin(name, entries, bare=bare) as incoming:
            for index, data in enumerate(contents.values()):
                if data:
                    incoming.write(index, 0, data)
            return incoming.commit()

    def _set_aside(self) -> None:
        """Keeps what an earlier state may have named: of a state that is new, nobody knows what is needed."""
        if self.store is not None and (aside := self.store.quarantine()) is not None:
            _log.warning(
                "the state is new: uploads and copies that it does not name were moved aside", folder=str(aside)
            )

    def _settle(self, record: Record) -> None:
        """Finds an upload's files again, should the state directory have been moved."""
        if self.store is not None and record.source.path.startswith(UPLOAD_SCHEME):
            with contextlib.suppress(AdapterSourceNotFoundError):
                record.folder = self.store.place(record.source.path.removeprefix(UPLOAD_SCHEME)).resolve()

    def _document(self, name: str) -> Document | None:
        record = self._books.registry.get(name)
        return None if record is None else document_of(record)

    def _on_written(self, changes: Mapping[str, Document | None]) -> None:
        written = {name: set() if document is None else _keys(document) for name, document in changes.items()}
        with self._lock:
            self._written |= written
        self._sweep()

    def _sweep(self) -> None:
        """Removes what nobody needs; what cannot be removed now is said, and stays until the next time."""
        if self.store is None:
            return
        try:
            self.store.sweep(self._needed)
        except OSError as error:
            _log.warning("the store was not swept", error=str(error))

    def _needed(self) -> set[Digest]:
        with self._lock:
            return set().union(*(record.store_keys for record in self._books.registry), *self._written.values())


def _keys(document: Document) -> set[Digest]:
    return record_of("", document).store_keys

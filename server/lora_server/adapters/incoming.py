"""Files on their way into the store: written aside in their order, checked against what was promised, made durable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from lora_server.adapters.disk import disk_errors, fsync_folder
from lora_server.adapters.source import FileBytes, manifest_digest
from lora_server.errors import UploadMismatchError
from lora_server.types import Digest

_BARE_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an upload: its relative path, its size, and the hex digits of its SHA-256."""

    path: str
    size_bytes: int
    sha256: str


class Shelf(Protocol):
    """What files on their way need of the store."""

    @property
    def min_free_bytes(self) -> int:
        """What of the disk must stay free."""
        ...

    def check_disk(self, needed_bytes: int) -> None:
        """Raises DiskFullError if the disk has no room for so many bytes."""
        ...

    def arrived(self, folder: Path, size_bytes: int) -> None:
        """Notes that so many bytes are on the disk by now."""
        ...

    def publish(self, folder: Path, digest: Digest) -> None:
        """Makes a complete folder visible, and holds it."""
        ...

    def end(self, folder: Path) -> None:
        """Gives back the room that was taken."""
        ...


class Incoming:
    """Files on their way into the store. A context manager: what was not committed is removed. Thread-safe."""

    def __init__(self, store: Shelf, folder: Path, label: str, files: Sequence[FileEntry], *, bare: bool) -> None:
        self._store = store
        self._folder = folder
        self._files = tuple(files)
        self._bare = bare
        self._root = folder if bare else folder / label
        self._lock = threading.Lock()
        self._index = 0
        self._written = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self._folder

    @property
    def digest(self) -> Digest:
        """What it will be found under."""
        if self._bare:
            return f"sha256:{self._files[0].sha256}"
        return manifest_digest({file.path: (file.size_bytes, file.sha256) for file in self._files})

    def write(self, index: int, offset_bytes: int, data: FileBytes) -> None:
        """Takes the next bytes; a file ends when it has its size.

        Raises:
            UploadMismatchError: If these are not the next bytes, or the file is not what was promised.
            DiskFullError: If the disk has been filled meanwhile, by whomever.
            StorageFailedError: If it cannot be written for another reason.
        """
        with self._lock, disk_errors(len(data), self._store.min_free_bytes):
            self._write(index, offset_bytes, data)

    def _write(self, index: int, offset_bytes: int, data: FileBytes) -> None:
        self._skip_empty()
        if self._index >= len(self._files):
            raise UploadMismatchError(self._files[-1].path, "no more bytes", f"{len(data)} bytes")
        file = self._files[self._index]
        if (index, offset_bytes) != (self._index, self._written):
            expected = f"byte {self._written} of file {self._index}"
            raise UploadMismatchError(file.path, expected, f"byte {offset_bytes} of file {index}")
        if self._written + len(data) > file.size_bytes:
            raise UploadMismatchError(file.path, f"{file.size_bytes} bytes", f"{self._written + len(data)} or more")
        self._store.check_disk(len(data))
        if self._file is None:
            self._file = self._open(file)
        self._file.write(data)
        self._hash.update(data)
        self._written += len(data)
        self._store.arrived(self._folder, len(data))
        if self._written == file.size_bytes:
            self._end_file(file)

    def commit(self) -> Digest:
        """Makes the files visible and durable under their digest, which is held until `ContentStore.release`.

        Raises:
            UploadMismatchError: If bytes are missing.
            DiskFullError, StorageFailedError: If they cannot be made durable; nothing is held.
        """
        with self._lock, disk_errors(0, self._store.min_free_bytes):
            return self._commit()

    def _commit(self) -> Digest:
        self._skip_empty()
        if self._index < len(self._files):
            file = self._files[self._index]
            raise UploadMismatchError(file.path, f"{file.size_bytes} bytes", f"{self._written}")
        for folder in sorted({path.parent for path in self._folder.rglob("*")}, reverse=True):
            fsync_folder(folder)
        self._store.publish(self._folder, self.digest)
        return self.digest

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stalled(self, silent_s: float) -> UploadMismatchError:
        """The error of an upload of which nothing has come for so long."""
        file = self._files[min(self._index, len(self._files) - 1)]
        expected = f"{file.size_bytes} bytes"
        return UploadMismatchError(file.path, expected, f"{self._written}, and nothing more for {silent_s:g} s")

    def close(self) -> None:
        """Removes what was not committed, and gives its room back; idempotent. Blocks on the disk."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):  # what was not written yet has no room
                    self._file.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._store.end(self._folder)

    def _open(self, file: FileEntry) -> BinaryIO:
        path = self._root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb")

    def _end_file(self, file: FileEntry) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        found, self._hash = self._hash.hexdigest(), hashlib.sha256()
        if found != file.sha256:
            raise UploadMismatchError(file.path, file.sha256, found)
        self._index, self._written = self._index + 1, 0

    def _skip_empty(self) -> None:
        """Makes the empty files that come next, for which no bytes are sent."""
        while self._index < len(self._files) and not self._files[self._index].size_bytes:
            self._file = self._open(self._files[self._index])
            self._end_file(self._files[self._index])


def is_bare(files: Sequence[FileEntry]) -> bool:
    """Whether an upload of *files* is a bare file rather than a folder."""
    return len(files) == 1 and files[0].path.endswith(_BARE_SUFFIX) and "/" not in files[0].path

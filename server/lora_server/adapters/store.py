"""The server's own files of adapters, by content: what was uploaded, and copies of what is pinned.

    STATE/store/HEX/LABEL/...         a folder's files; HEX is the digest of their manifest
    STATE/store/HEX/NAME.safetensors  a bare file; HEX is its sha256sum
    STATE/incoming/*                  what is being written, or removed
    STATE/quarantine/TIME/HEX/...     what was there when the state was new; the server never looks at it again

What lies under its digest is complete: files are written aside and fsynced, with their folders, before one rename
makes them visible, and that rename is fsynced before anybody hears of it. Owns no names: who needs what is asked when
unneeded files are swept. Thread-safe; blocks on the disk. Pure Python.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lora_server.adapters.naming import is_valid_digest
from lora_server.adapters.source import FileBytes, manifest_digest
from lora_server.errors import (
    AdapterSourceNotFoundError,
    DiskFullError,
    StorageFailedError,
    StoreFullError,
    UploadMismatchError,
)
from lora_server.types import Digest

_BARE_SUFFIX = ".safetensors"


class StateLockedError(OSError):
    """Another server uses the state directory."""


def lock_directory(folder: Path) -> BinaryIO:
    """Makes *folder* and locks it for this process, until the file that is returned is closed.

    Raises:
        StateLockedError: If another process holds the lock.
        OSError: If it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "ab")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise StateLockedError(f"{folder} is the state directory of another running server") from error
    return file


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an upload: its relative path, its size, and the hex digits of its SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much the store may have, and how much of its disk must stay free, in bytes."""

    max_bytes: int = 2**63 - 1
    min_free_bytes: int = 0


class ContentStore:
    """Folders and files by the digest of their content, within limits."""

    def __init__(self, state_dir: Path, limits: StoreLimits | None = None) -> None:
        """Makes the folders under *state_dir*, and removes what an earlier process left half-written."""
        self._limits = limits or StoreLimits()
        self._arriving: dict[Path, tuple[int, int]] = {}
        """By folder: bytes in all, and how many of them are not on the disk yet."""
        self._quarantine = state_dir / "quarantine"
        self._store = state_dir / "store"
        self._incoming = state_dir / "incoming"
        self._lock = threading.Lock()
        self._held: Counter[Digest] = Counter()
        shutil.rmtree(self._incoming, ignore_errors=True)
        for folder in (self._store, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        self._resolved_root = self._store.resolve()
        self._sizes = {digest: _size_of(self._folder(digest)) for digest in self.digests()}
        fsync_folder(state_dir)

    @property
    def min_free_bytes(self) -> int:
        """What of the disk must stay free."""
        return self._limits.min_free_bytes

    @property
    def root(self) -> Path:
        """Where complete files lie."""
        return self._store

    @property
    def resolved_root(self) -> Path:
        """The same with links resolved, without looking at the disk."""
        return self._resolved_root

    def place(self, digest: Digest) -> Path:
        """Returns the folder or bare file of *digest*.

        Raises:
            AdapterSourceNotFoundError: If it is not in the store.
        """
        folder = self._folder(digest)
        names: list[str] = []
        with contextlib.suppress(OSError):  # it may be swept at this moment
            names = os.listdir(folder) if is_valid_digest(digest) else []
        if len(names) != 1:
            raise not_in_store(digest)
        return folder / names[0]

    def __contains__(self, digest: Digest) -> bool:
        return is_valid_digest(digest) and self._folder(digest).is_dir()

    def digests(self) -> frozenset[Digest]:
        """What is in the store."""
        return frozenset(f"sha256:{name}" for name in os.listdir(self._store))

    def begin(self, label: str, files: Sequence[FileEntry], *, bare: bool) -> Incoming:
        """Begins to write files, which must arrive in this order; *label* names a folder in messages.

        Room for all of them is taken at once, and given back when the `Incoming` ends.

        Raises:
            StoreFullError, DiskFullError: If there is none; nothing is written.
        """
        incoming = Incoming(self, self._incoming / uuid.uuid4().hex, label, files, bare=bare)
        needed_bytes = sum(file.size_bytes for file in files)
        with self._lock:
            used_bytes = sum(self._sizes.values()) + sum(whole for whole, _ in self._arriving.values())
            if incoming.digest not in self._sizes and used_bytes + needed_bytes > self._limits.max_bytes:
                raise StoreFullError(needed_bytes, used_bytes, self._limits.max_bytes)
            with disk_errors(needed_bytes, self.min_free_bytes):
                self.check_disk(needed_bytes + sum(left for _, left in self._arriving.values()))
            self._arriving[incoming.folder] = needed_bytes, needed_bytes
        return incoming

    def arrived(self, folder: Path, size_bytes: int) -> None:
        """Notes that so many bytes of an `Incoming` are on the disk by now."""
        with self._lock:
            whole, left = self._arriving[folder]
            self._arriving[folder] = whole, left - size_bytes

    def end(self, folder: Path) -> None:
        """Gives back the room that an `Incoming` had taken; idempotent."""
        with self._lock:
            self._arriving.pop(folder, None)

    def check_disk(self, needed_bytes: int) -> None:
        """Raises DiskFullError unless the disk has room for so many bytes beside what must stay free."""
        free_bytes = shutil.disk_usage(self._incoming).free
        if free_bytes - needed_bytes < self._limits.min_free_bytes:
            raise DiskFullError(needed_bytes, free_bytes, self._limits.min_free_bytes)

    def hold(self, digest: Digest) -> None:
        """Keeps *digest* from being swept until `release`, whether it is referenced or not; counts."""
        with self._lock:
            self._held[digest] += 1

    def release(self, digest: Digest) -> None:
        """Ends one `hold`."""
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    def sweep(self, referenced: Callable[[], Collection[Digest]]) -> int:
        """Removes what is neither held nor *referenced*, which is asked after the store is closed to newcomers.

        Returns how many were removed. What cannot be removed stays until the next sweep.

        Raises:
            OSError: If some could not be, the first reason; the others are removed all the same.
        """
        aside = self._incoming / uuid.uuid4().hex
        try:
            with self._lock:
                unneeded = self.digests() - set(self._held) - set(referenced())
                return self._move(unneeded, aside) if unneeded else 0
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def quarantine(self) -> Path | None:
        """Moves all that is there out of the store, for good, and returns where to; None if there is nothing.

        Raises:
            OSError: If some could not be moved.
        """
        with self._lock:
            present = self.digests() - set(self._held)
            if not present:
                return None
            aside = self._quarantine / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-{uuid.uuid4().hex[:4]}")
            self._move(present, aside)
        for folder in (aside, self._quarantine, self._quarantine.parent):
            fsync_folder(folder)
        return aside

    def _move(self, digests: Collection[Digest], aside: Path) -> int:
        """Moves entries into the new folder *aside*, as many as can be; returns how many, or raises the first error."""
        failed: OSError | None = None
        moved = 0
        aside.mkdir(parents=True)
        for digest in sorted(digests):
            try:
                os.rename(self._folder(digest), aside / digest.removeprefix("sha256:"))
            except OSError as error:
                failed = failed or error
            else:
                self._sizes.pop(digest, None)
                moved += 1
        fsync_folder(self._store)
        if failed is not None:
            raise failed
        return moved

    def publish(self, folder: Path, digest: Digest) -> None:
        """Makes a complete, fsynced *folder* visible under *digest*, and holds it; one that is there already stays."""
        with self._lock:
            if not self._folder(digest).is_dir():
                size_bytes = _size_of(folder)
                os.rename(folder, self._folder(digest))
                self._sizes[digest] = size_bytes
                fsync_folder(self._store)
            self._held[digest] += 1

    def _folder(self, digest: Digest) -> Path:
        return self._store / digest.removeprefix("sha256:")


class Incoming:
    """Files on their way into the store. A context manager: what was not committed is removed. Thread-safe."""

    def __init__(
        self, store: ContentStore, folder: Path, label: str, files: Sequence[FileEntry], *, bare: bool
    ) -> None:
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


@contextlib.contextmanager
def disk_errors(needed_bytes: int, min_free_bytes: int) -> Iterator[None]:
    """What the system says of a disk that is full, read-only or broken, in the house's words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(needed_bytes, 0, min_free_bytes) from error
        raise StorageFailedError(error.strerror or str(error)) from error


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def not_in_store(digest: Digest) -> AdapterSourceNotFoundError:
    """What is said of a digest that is not there, or that a caller must not know to be there."""
    return AdapterSourceNotFoundError(digest, "is not in the server's store")


def fsync_folder(folder: Path) -> None:
    """Makes the entries of *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

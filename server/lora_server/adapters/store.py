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
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_server.adapters.disk import disk_errors, fsync_folder
from lora_server.adapters.incoming import FileEntry, Incoming, is_bare
from lora_server.adapters.naming import is_valid_digest
from lora_server.errors import (
    AdapterSourceNotFoundError,
    DiskFullError,
    StoreFullError,
)
from lora_server.types import Digest

__all__ = [
    "ContentStore",
    "FileEntry",
    "Incoming",
    "StateLockedError",
    "StoreLimits",
    "is_bare",
    "lock_directory",
    "not_in_store",
]


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


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def not_in_store(digest: Digest) -> AdapterSourceNotFoundError:
    """What is said of a digest that is not there, or that a caller must not know to be there."""
    return AdapterSourceNotFoundError(digest, "is not in the server's store")

"""What a disk says and what makes it sure, in the house's words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from lora_server.errors import DiskFullError, StorageFailedError


@contextlib.contextmanager
def disk_errors(needed_bytes: int, min_free_bytes: int) -> Iterator[None]:
    """What the system says of a disk that is full, read-only or broken, in the house's words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(needed_bytes, 0, min_free_bytes) from error
        raise StorageFailedError(error.strerror or str(error)) from error


def fsync_folder(folder: Path) -> None:
    """Makes the entries of *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The three standard file descriptors, before anything else of a process is opened."""

from __future__ import annotations

import os


def fill_standard_descriptors() -> None:
    """Opens the null device where a standard descriptor is closed (`2>&-`).

    The next file or socket would get its number, and take what libraries write to standard error.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free

"""Waiting until nobody writes an adapter's files any more, as far as their times tell. Blocks; pure Python.

A file that was written within the last tick of its file system's clock can be written once more without another ctime;
and a folder that is written file by file has, for a moment, some files of one version and some of another.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TypeVar

from lora_server.adapters.source import CTIME, Signature
from lora_server.errors import AdapterChangingError

TICK_S = 0.012
"""More than a tick of the clock that file systems take their times from, 4 to 10 ms."""
QUIET_S = 0.25
"""How long a folder that has changed must have been left alone before it is read."""
WRITING_S = 5.0
"""How long after its last change what cannot be read is taken for half-written."""
REPLACING_S = 0.5
"""How long after something else has changed beside it, what is missing may be on its way."""
BUSY_S = 1.0
"""How long a folder that did not settle is not waited for again."""
_MAX_WAIT_S = 1.0
_TRIES = 4
T = TypeVar("T")


def settled(look: Callable[[], Signature], quiet_s: float, name: str) -> Signature:
    """Returns what *look* says once the files have not changed for *quiet_s*; blocks for little more than a second.

    A time in the future, of another machine's clock, is not waited for.

    Raises:
        AdapterChangingError: If they change all the time; *name* is for the message. And whatever *look* raises.
    """
    end_s = time.monotonic() + _MAX_WAIT_S
    while True:
        signature = look()
        changed_s = max((int(entry[CTIME]) for entry in signature), default=0) / 1e9
        age_s = time.time() - changed_s
        if not 0 <= age_s < quiet_s:
            return signature
        if time.monotonic() > end_s:
            raise AdapterChangingError(name)
        time.sleep(quiet_s - age_s)


def read_settled(look: Callable[[], Signature], read: Callable[[], T], name: str) -> tuple[Signature, T]:
    """Returns what *read* brings of files as they were at one time, and their signature; reads again what changes.

    Raises:
        AdapterChangingError: If they change all the time; *name* is for the message. And what *look* and *read* raise.
    """
    for _ in range(_TRIES):
        signature = settled(look, TICK_S, name)
        found = read()
        if look() == signature:
            return signature, found
        del found  # before the next is read: both may be large
    raise AdapterChangingError(name)


class Flux(Enum):
    """What happens to files at this moment, as far as times tell."""

    STILL = "still"
    WRITTEN = "written"
    VANISHED = "vanished"
    """They are not there, and may be a moment later: what they lay in has just changed."""


def flux(place: Path) -> Flux:
    """Tells whether a folder or file has just been changed or removed."""
    times = list(_change_times(place))
    if times:
        return Flux.WRITTEN if any(_is_recent(changed_s, WRITING_S) for changed_s in times) else Flux.STILL
    with contextlib.suppress(OSError):
        there = next(each for each in place.parents if os.path.lexists(each))
        return Flux.VANISHED if _is_recent(there.lstat().st_ctime, REPLACING_S) else Flux.STILL
    return Flux.VANISHED


def _is_recent(changed_s: float, within_s: float) -> bool:
    return 0 <= time.time() - changed_s < within_s


def _change_times(place: Path) -> Iterator[float]:
    """When the place, its entries and those of its sub-folders changed; nothing if it is not there."""
    with contextlib.suppress(OSError):
        yield place.lstat().st_ctime
        for entry in _entries(place):
            with contextlib.suppress(OSError):
                yield entry.stat().st_ctime
                yield from (inner.stat().st_ctime for inner in _entries(entry))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []

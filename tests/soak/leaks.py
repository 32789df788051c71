"""Whether a process holds more after its work than before: its books at two quiet moments, its memory between."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_server.adapters.documents import record_of
from lora_server.adapters.state import StateFile

MAX_GROWTH_BYTES = 64 * 2**20
"""Between two quiet moments of one process. A leaked request would keep its log with its pictures: 10 KB or more."""

MAX_DESCRIPTORS, MAX_TASKS, MAX_THREADS = 10, 10, 4
"""More than before: connections, and threads of pools that start late."""

_NONE_LEFT = ("running", "queued", "leases", "slots_taken")


def faults(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Says what leaked between two books of one process, both taken when nobody used it."""
    found = [
        f"{key} left {when}: {books[key]}"
        for when, books in (("before", before), ("after", after))
        for key in _NONE_LEFT
        if books[key]
    ]
    found += [f"books {books['integrity']}" for books in (before, after) if books["integrity"] != "right"]
    for key, bound in (("descriptors", MAX_DESCRIPTORS), ("tasks", MAX_TASKS), ("threads", MAX_THREADS)):
        if after[key] > before[key] + bound:
            found.append(f"{key} grew from {before[key]} to {after[key]}")
    growth = after["rss_bytes"] - before["rss_bytes"]
    if growth > MAX_GROWTH_BYTES:
        found.append(f"memory grew by {growth / 2**20:.0f} MiB")
    return found


def slope_bytes_a_minute(samples: Sequence[tuple[float, int]]) -> float:
    """The growth of memory by a straight line through (seconds, bytes)."""
    if len(samples) < 2:
        return 0.0
    line = statistics.linear_regression([at for at, _ in samples], [size for _, size in samples])
    return float(line.slope) * 60


def state_faults(state: Path) -> list[str]:
    """Says what a stopped server's state directory has that it should not have, or has not."""
    documents = StateFile(state / "state.sqlite3").read()
    needed = {key for name, document in documents.items() for key in record_of(name, document).store_keys}
    stored = {f"sha256:{path.name}" for path in (state / "store").iterdir()}
    found = [f"half-written: {path.name}" for path in (state / "incoming").iterdir()]
    found += [f"in the store for nobody: {key}" for key in sorted(stored - needed)]
    return found + [f"not in the store: {key}" for key in sorted(needed - stored)]

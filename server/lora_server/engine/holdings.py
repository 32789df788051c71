"""Images that are made and not taken by their callers: whose they are, and how many bytes. Thread-safe; never blocks.

What a slow reader leaves lying is held for it, so it counts against its tenant: who holds too much begins nothing new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lora_server.scheduler.queue import Queueable
from lora_server.scheduler.shares import Shares


class Holdings:
    """Bytes of unread images by tenant and request.

    | invariant | |
    |---|---|
    | `used_bytes` | sum of what is held of all requests |
    | a request in `_held` | has bytes; of a tenant, the one that has had some for longest is first |
    """

    def __init__(self, shares: Shares, on_room: Callable[[], None] = lambda: None) -> None:
        """*on_room* is called, from any thread, when something is given back."""
        self._shares = shares
        self._on_room = on_room
        self._lock = threading.Lock()
        self._held: dict[str, dict[Queueable, int]] = {}
        self._sums: dict[str, int] = {}
        self.used_bytes = 0

    @property
    def max_bytes(self) -> int:
        """What may be held of all."""
        return self._shares.total

    @property
    def max_tenant_bytes(self) -> int:
        """What may be held of one tenant."""
        return self._shares.of_a_tenant

    def change(self, job: Queueable, num_bytes: int) -> None:
        """Notes that so many bytes more, or less, are held of *job*."""
        if not num_bytes:
            return
        with self._lock:
            jobs = self._held.setdefault(job.tenant, {})
            jobs[job] = jobs.get(job, 0) + num_bytes
            if not jobs[job]:
                del jobs[job]
            self.used_bytes += num_bytes
            self._sums[job.tenant] = self._sums.get(job.tenant, 0) + num_bytes
            if not jobs:
                del self._held[job.tenant], self._sums[job.tenant]
        if num_bytes < 0:
            self._on_room()

    def has_room(self, tenant: str) -> bool:
        """Whether a tenant may ask for more images."""
        with self._lock:
            return self._has_room(tenant)

    def may_begin(self, job: Queueable) -> bool:
        """Whether an image of *job* may begin.

        If the tenant holds too much, only its request that has held something for longest goes on: it can end, and be
        taken, so nobody waits for himself.
        """
        with self._lock:
            return self._has_room(job.tenant) or next(iter(self._held[job.tenant])) is job

    def bytes_of(self, tenant: str) -> int:
        """What is held of a tenant."""
        with self._lock:
            return self._sums.get(tenant, 0)

    def _has_room(self, tenant: str) -> bool:
        held = self._sums.get(tenant, 0)
        return not held or self._shares.has_room(held, self.used_bytes)

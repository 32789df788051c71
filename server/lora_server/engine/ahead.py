"""Adapters ahead of time: brought to the device before the request that wants them starts. Engine thread only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import torch

from lora_server.adapters.api import AdapterLease, ResolvedAdapter
from lora_server.adapters.futures import result_now
from lora_server.adapters.manager import AdapterManager
from lora_server.engine.guard import Guard
from lora_server.engine.residency import DeviceResidency
from lora_server.errors import LoraServerError

_log = structlog.get_logger(__name__)


class Ahead:
    """Uploads that nobody waits for."""

    def __init__(self, manager: AdapterManager, residency: DeviceResidency, guard: Guard) -> None:
        self._manager = manager
        self._residency = residency
        self._guard = guard

    def prefetch(self, adapters: Sequence[ResolvedAdapter]) -> None:
        """Uploads the adapters of a queued request where there is room, while others step."""
        self._with_lease(adapters, lambda lease: self._residency.prefetch(adapters, lease))

    def bring_to_device(self, adapters: Sequence[ResolvedAdapter]) -> None:
        """Uploads versions that were pinned to the device, so that their first request need not."""

        def upload(lease: AdapterLease) -> None:
            self._residency.acquire(adapters, lease)
            self._residency.release(adapters)

        self._with_lease(adapters, upload)

    def _with_lease(self, adapters: Sequence[ResolvedAdapter], action: Callable[[AdapterLease], None]) -> None:
        """Runs *action* under a lease, if that can be had at once; what it cannot do is left for later."""
        try:
            lease = result_now(self._manager.acquire(adapters))
            if lease is None:  # evicted or unpinned again before its turn came
                return
            with lease:
                action(lease)
        except (LoraServerError, torch.OutOfMemoryError) as error:
            self._guard.note_memory(error, "upload")
            _log.warning("cannot bring adapters to the device", adapters=[a.applied.name for a in adapters])

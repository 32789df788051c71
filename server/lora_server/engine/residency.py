"""Adapters on the device: uploads what a batch needs into slots, and keeps what is used often there.

The slot table (`adapters.slots`, pure) decides who goes and who stays; this file moves the tensors. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_server.adapters.api import AdapterLease, ResolvedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.models.merge import ScaledAdapter
from lora_server.models.weights import AdapterWeights
from lora_server.types import Digest


class DeviceResidency:
    """The device's copies of adapter weights, one for each used slot."""

    def __init__(self, manager: AdapterManager, device: torch.device) -> None:
        self._slots = manager.slots
        self._device = device
        self._weights: dict[int, tuple[Digest, AdapterWeights]] = {}

    def acquire(self, adapters: Sequence[ResolvedAdapter], lease: AdapterLease) -> tuple[ScaledAdapter, ...]:
        """Returns the composition of *adapters* with its weights on the device; uploads what is not there.

        The slots stay taken until `release`. If an upload fails (out of memory), nothing stays taken.
        """
        digests = [adapter.applied.digest for adapter in adapters]
        assignments = self._slots.acquire(digests)
        try:
            for slot, digest, needs_upload in assignments:
                if needs_upload or self._weights.get(slot, ("", None))[0] != digest:
                    self._upload(slot, digest, lease.weights)
        except BaseException:
            self._slots.release(digests)
            for slot, digest, needs_upload in assignments:
                if needs_upload:
                    self._slots.forget(digest)
                    self._weights.pop(slot, None)
            raise
        by_digest = {digest: self._weights[slot][1] for slot, digest, _ in assignments}
        return tuple(
            ScaledAdapter(adapter.applied.digest, adapter.applied.scale, by_digest[adapter.applied.digest])
            for adapter in adapters
        )

    def release(self, adapters: Sequence[ResolvedAdapter]) -> None:
        """Lets go of the slots; the tensors stay until somebody else needs the slot."""
        self._slots.release([adapter.applied.digest for adapter in adapters])

    def _upload(self, slot: int, digest: Digest, weights: Mapping[Digest, object]) -> None:
        host = weights[digest]
        assert isinstance(host, AdapterWeights)
        self._weights.pop(slot, None)  # frees the old tenant's memory before the new one's is taken
        self._weights[slot] = (digest, host.to(self._device))

"""Adapters on the device: uploads what batches need, ahead of time where it can, and keeps what is used often there.

The slot table (`adapters.slots`, pure) decides who goes and who stays; this file moves the tensors, on a stream of
their own so that steps go on meanwhile. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_server.adapters.api import AdapterLease, ResolvedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.models.merge import ScaledAdapter
from lora_server.models.weights import AdapterWeights
from lora_server.types import Digest


@dataclass(frozen=True, slots=True)
class _Resident:
    """A version on the device; its copy is done when *uploaded* says so, or at once without one."""

    digest: Digest
    weights: AdapterWeights
    uploaded: torch.cuda.Event | None


class DeviceResidency:
    """The device's copies of adapter weights, one for each used slot."""

    def __init__(self, manager: AdapterManager, device: torch.device) -> None:
        self._slots = manager.slots
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._residents: dict[int, _Resident] = {}
        self._uploading: list[tuple[AdapterWeights, torch.cuda.Event]] = []

    @property
    def used_bytes(self) -> int:
        """Bytes on the device; about right from any thread."""
        return sum(resident.weights.size_bytes for resident in list(self._residents.values()))

    def clear(self) -> None:
        """Drops all weights; slots that are taken or pinned are filled again when they are next acquired."""
        residents, self._residents = self._residents, {}
        for resident in residents.values():
            self._slots.forget(resident.digest)

    def has_room(self, adapters: Sequence[ResolvedAdapter]) -> bool:
        """Whether slots for all *adapters* are there beside those that are taken and pinned."""
        return self._slots.can_acquire([adapter.applied.digest for adapter in adapters])

    def acquire(self, adapters: Sequence[ResolvedAdapter], lease: AdapterLease) -> tuple[ScaledAdapter, ...]:
        """Returns the composition of *adapters* with its weights on the device; uploads what is not there.

        The current stream waits for the uploads, the caller does not. The slots stay taken until `release`. If an
        upload fails (out of memory), nothing stays taken.

        Raises:
            CacheExhaustedError: If there are not enough slots.
        """
        slots = self._place(adapters, lease)
        found = {digest: self._ready(slot) for digest, slot in slots.items()}
        return tuple(
            ScaledAdapter(applied.digest, applied.scale, found[applied.digest], applied.settings)
            for applied in (adapter.applied for adapter in adapters)
        )

    def _place(self, adapters: Sequence[ResolvedAdapter], lease: AdapterLease) -> dict[Digest, int]:
        """Takes a slot for each version and begins the uploads that it needs; no stream waits for them."""
        digests = [adapter.applied.digest for adapter in adapters]
        assignments = self._slots.acquire(digests)
        self.trim()
        try:
            for slot, digest, _ in assignments:
                known = self._residents.get(slot)
                if known is None or known.digest != digest:
                    self._upload(slot, digest, lease.weights)
        except BaseException:
            self._slots.release(digests)
            for slot, digest, needs_upload in assignments:
                if needs_upload:
                    self._slots.forget(digest)
                    self._residents.pop(slot, None)
            raise
        return {digest: slot for slot, digest, _ in assignments}

    def release(self, adapters: Sequence[ResolvedAdapter]) -> None:
        """Lets go of the slots; the tensors stay until somebody else needs the slot, or go if they were forgotten."""
        self._slots.release([adapter.applied.digest for adapter in adapters])
        self.trim()

    def trim(self) -> None:
        """Lets go of the tensors of versions that lost their slot, and of host memory that has been uploaded.

        What the host cache has evicted would else stay in host memory for as long as it is on the device.
        """
        # Apart from the slots, which may have another version by now: the device reads host memory until the event.
        self._uploading = [each for each in self._uploading if not each[1].query()]
        for slot, resident in list(self._residents.items()):
            if not self._slots.holds(slot, resident.digest):
                del self._residents[slot]

    def prefetch(self, adapters: Sequence[ResolvedAdapter], lease: AdapterLease) -> None:
        """Uploads *adapters* if that costs no resident one its place; returns at once."""
        missing = [a for a in adapters if not self._slots.is_resident(a.applied.digest)]
        if missing and self._slots.num_slots - self._slots.num_resident >= len(missing):
            self._place(adapters, lease)
            self.release(adapters)

    def _upload(self, slot: int, digest: Digest, weights: Mapping[Digest, object]) -> None:
        host = weights[digest]
        assert isinstance(host, AdapterWeights)
        self._residents.pop(slot, None)  # frees the old tenant's memory before the new one's is taken
        if self._stream is None:
            self._residents[slot] = _Resident(digest, host.to(self._device), None)
            return
        with torch.cuda.stream(self._stream):
            copy = host.to(self._device)
            uploaded = torch.cuda.Event()
            uploaded.record()
        self._residents[slot] = _Resident(digest, copy, uploaded)
        self._uploading.append((host, uploaded))

    def _ready(self, slot: int) -> AdapterWeights:
        """The weights of a slot, which the current stream may read from now on."""
        resident = self._residents[slot]
        if resident.uploaded is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(resident.uploaded)
            # Its memory came from the stream of the uploads; the steps that read it may outlive its slot.
            for reader in (stream, torch.cuda.default_stream(self._device)):
                for buffer in (resident.weights.flat, resident.weights.exact):
                    if buffer is not None:
                        buffer.record_stream(reader)
        return resident.weights

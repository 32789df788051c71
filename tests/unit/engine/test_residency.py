"""The device's copies: they go with their slots, and host memory does not stay behind them."""

from __future__ import annotations

import gc
import weakref
from typing import cast

import pytest
import torch
from lora_server.adapters.api import AdapterLease, ResolvedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.slots import SlotTable
from lora_server.engine.residency import DeviceResidency
from lora_server.models.weights import AdapterWeights
from lora_server.types import AdapterState, AppliedAdapter


class _Manager:
    """All that residency asks of a manager."""

    def __init__(self) -> None:
        self.slots = SlotTable(2, 1)


def weights() -> AdapterWeights:
    """Nothing but a buffer."""
    return AdapterWeights(torch.zeros(4), {}, ())


def adapter(digest: str) -> ResolvedAdapter:
    """A resolved use of a version."""
    return ResolvedAdapter(AppliedAdapter(digest, 1, digest, 1.0), AdapterState.CACHED, 0.0, 16)


@pytest.fixture
def manager() -> _Manager:
    """Two slots."""
    return _Manager()


@pytest.fixture
def residency(manager: _Manager) -> DeviceResidency:
    """On the CPU."""
    return DeviceResidency(cast(AdapterManager, manager), torch.device("cpu"))


def test_a_forgotten_version_leaves_no_tensors(manager: _Manager, residency: DeviceResidency) -> None:
    """Unloading frees the memory, not only the books: at once when trimmed, or with the last use."""
    for taken_meanwhile in (False, True):
        host = weights()
        flat = weakref.ref(host.flat)
        residency.acquire([adapter("a")], AdapterLease({"a": host}, lambda: None))
        del host
        if taken_meanwhile:
            manager.slots.forget("a")
            residency.release([adapter("a")])
        else:
            residency.release([adapter("a")])
            manager.slots.forget("a")
            residency.trim()
        gc.collect()
        assert flat() is None


def test_an_uploaded_version_does_not_hold_its_host_memory(residency: DeviceResidency) -> None:
    """Once the copy is done, what the host cache evicts is really freed."""
    host = weights()
    residency.acquire([adapter("a")], AdapterLease({"a": host}, lambda: None))
    residency.release([adapter("a")])
    assert all(resident.host is None for resident in residency._residents.values())

"""The device's copies: they go with their slots, and host memory does not stay behind them."""

from __future__ import annotations

import contextlib
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


class _Event:
    """Of an upload that takes until it is told to be done."""

    done = False

    def record(self) -> None:
        """Nothing."""

    def query(self) -> bool:
        """Whether the device has read the host's memory."""
        return _Event.done


def test_host_memory_outlives_the_slot_while_the_device_reads_it(
    manager: _Manager, residency: DeviceResidency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that loses its slot in the middle of its upload: a pool would else give its memory to another."""
    monkeypatch.setattr(_Event, "done", False)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(residency, "_stream", object())
    host = weights()
    flat = weakref.ref(host.flat)
    monkeypatch.setattr(AdapterWeights, "to", lambda self, _: weights())
    residency._place([adapter("a")], AdapterLease({"a": host}, lambda: None))
    residency.release([adapter("a")])
    manager.slots.forget("a")
    residency.trim()
    del host
    gc.collect()
    assert flat() is not None
    monkeypatch.setattr(_Event, "done", True)
    residency.trim()
    gc.collect()
    assert flat() is None

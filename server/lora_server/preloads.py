"""The adapters that are there before a server serves: loaded, bound to tenants and pinned as the operator says."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from pathlib import Path

import structlog

from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.naming import stable_adapter_id
from lora_server.config import Preload
from lora_server.errors import LoraServerError
from lora_server.types import AdapterSource, AdapterState, AdapterUse, ById, ByName, PinLevel

_log = structlog.get_logger(__name__)
_UPLOAD_TIMEOUT_S = 60.0
_POLL_S = 0.01


def load_all(manager: AdapterManager, preloads: Sequence[Preload], replaceable: Container[str | None] = ()) -> None:
    """Loads *preloads*, bound and pinned; blocks. Those for the device are uploaded once the engine runs.

    One takes its name from an adapter of another source only if that name is *replaceable*.

    Raises:
        LoraServerError: If one cannot be loaded, or not be pinned beside the others.
    """
    for preload in preloads:
        # The id belongs to the path as it was given; the path itself must not depend on the roots' order.
        adapter_id = stable_adapter_id(preload.path)
        source = AdapterSource(path=str(Path(preload.path).absolute()), id=adapter_id, name=preload.name)
        tenants = None if preload.tenants is None else frozenset(preload.tenants)
        replace = preload.name in replaceable
        manager.load(source, default_scale=preload.scale, replace=replace, tenants=tenants).result()
        if preload.pin is not None:
            manager.pin(ById(adapter_id), PinLevel[preload.pin.upper()]).result()
        _log.info("adapter preloaded", path=preload.path, default_scale=preload.scale, pin=preload.pin)


def cache_again(manager: AdapterManager, names: Sequence[str]) -> None:
    """Caches adapters that an earlier process registered, whatever their names mean by now; blocks.

    One that cannot be cached is logged, and stays registered.
    """
    for name in names:
        try:
            manager.resolve([AdapterUse(ByName(name))]).result()
        except LoraServerError as error:
            _log.error("a restored adapter could not be cached", adapter=name, error=str(error))


def wait_for_device(manager: AdapterManager, preloads: Sequence[Preload]) -> None:
    """Waits until every preload that is pinned to the device is there; the engine must run.

    Raises:
        ValueError: If one is not there after a minute: it found no room.
    """
    deadline_s = time.monotonic() + _UPLOAD_TIMEOUT_S
    for preload in preloads:
        while preload.pin == "device" and not _is_resident(manager, preload):
            if time.monotonic() > deadline_s:
                raise ValueError(f"the preload {preload.path!r} cannot be kept on the device: it finds no room there")
            time.sleep(_POLL_S)


def _is_resident(manager: AdapterManager, preload: Preload) -> bool:
    info = manager.get(ById(stable_adapter_id(preload.path)))
    return next(each for each in info.versions if each.digest == info.current_digest).state is AdapterState.RESIDENT

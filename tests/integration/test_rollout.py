"""A new version comes while requests for the name wait: each gets what the name means when its turn has come."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_server.app import Core, build_core
from lora_server.config import CacheConfig, EngineConfig, LimitsConfig, ServerConfig
from lora_server.engine.job import EngineJob
from lora_server.errors import AdapterNotFoundError, LoraServerError
from lora_server.types import (
    AdapterSource,
    AdapterUse,
    ByDigest,
    ByName,
    GenerationParameters,
    GenerationRequest,
)

from tests.parity.engine_harness import events, pictures

WANTED = GenerationParameters("a red star", "", 64, 64, 2, 4.0, 1, 1)


@pytest.fixture(scope="module")
def root(demo_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that may change."""
    folder = tmp_path_factory.mktemp("rollout") / "root"
    shutil.copytree(demo_adapters, folder)
    return folder


@pytest.fixture(scope="module")
def core(root: Path) -> Iterator[Core]:
    """An engine with room for one adapter in its cache, and for one request at work."""
    core = build_core(
        ServerConfig(
            cache=CacheConfig(max_adapters=1, max_pinned_share=0, device_slots=2),
            limits=LimitsConfig(max_adapters_per_request=1),
            engine=EngineConfig(warm_sizes=((64, 64),), warm_images=(1,)),
            adapter_roots=(root,),
        )
    )
    yield core
    core.stop()


@pytest.fixture
def loaded(core: Core, root: Path) -> Iterator[str]:
    """The digest of the first version of `brand`."""
    (root / "brand").mkdir()
    shutil.copytree(root / "a", root / "brand", dirs_exist_ok=True)
    outcome = core.manager.load(AdapterSource(str(root / "brand"), name="brand")).result(30)
    yield outcome.adapter.current_digest
    core.manager.unload(ByName("brand"), drain=True)  # its last lease ends a moment after its last event
    shutil.rmtree(root / "brand")


def wait_with(core: Core, selector: Any, name: str, change: Any) -> EngineJob:
    """Submits a request, lets *change* happen once its adapter is resolved and before its turn, and returns it."""
    held = threading.Event()
    core.engine.call(lambda *_: held.wait(30))
    job = core.engine.submit(GenerationRequest(name, WANTED, (AdapterUse(selector, 1.0),)))
    core.engine.call(lambda *_: None)
    held.set()
    engine: Any = core.engine
    next_job = engine._admission.next
    engine._admission.next = lambda _: None  # nobody's turn comes
    try:
        deadline_s = time.monotonic() + 30
        while job.resolved is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert job.resolved is not None
        change()
    finally:
        engine._admission.next = next_job
    engine.call(lambda *_: None)
    return job


def roll_out(core: Core, root: Path) -> str:
    """Makes another version current, for which the one before is evicted; returns its digest."""
    shutil.rmtree(root / "brand")
    shutil.copytree(root / "b", root / "brand")
    return core.manager.load(AdapterSource(str(root / "brand"), name="brand")).result(30).adapter.current_digest


def test_a_waiting_request_for_a_name_gets_the_new_version(core: Core, root: Path, loaded: str) -> None:
    """The version that it was resolved to is gone for good; by its name it is served all the same."""
    rolled_out: list[str] = []
    job = wait_with(core, ByName("brand"), "by-name", lambda: rolled_out.append(roll_out(core, root)))
    assert len(pictures(events(job))) == 1
    assert [adapter.digest for adapter in job.applied] == rolled_out
    assert rolled_out != [loaded]
    core.manager.check_integrity()


def test_a_waiting_request_for_a_digest_does_not(core: Core, root: Path, loaded: str) -> None:
    """Who names a version gets that or an error, never another one."""
    job = wait_with(core, ByDigest(loaded), "by-digest", lambda: roll_out(core, root))
    with pytest.raises(LoraServerError) as refused:
        events(job)
    assert isinstance(refused.value, AdapterNotFoundError)
    assert loaded in str(refused.value)
    core.manager.check_integrity()

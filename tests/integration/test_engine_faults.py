"""Faults injected at every stage: the request at fault ends, the server goes on, the books are right, pictures too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.app import Core
from lora_server.engine.engine import LocalEngine
from lora_server.engine.job import EngineJob
from lora_server.errors import DeviceOutOfMemoryError, EngineFailureError, LoraServerError
from lora_server.types import GenerationParameters

from tests.parity.engine_harness import events, make_request, pictures, start_core

WANTED = GenerationParameters("a red star", "", 64, 64, 3, 4.0, 1, 1)
STAGES = ("encode", "upload", "step", "decode")


class Injector:
    """Lets a boundary of the engine raise while it is armed, for jobs whose adapter or turn it is."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine = engine
        self._patch = monkeypatch
        self.raised = 0

    def arm(self, stage: str, error: Callable[[], Exception], times: int | None = None) -> None:
        """Makes *stage* raise the next *times*, or always."""
        self.raised = 0
        owner, name = {
            "encode": (self._engine._runner._family, "encode"),
            "upload": (self._engine._residency, "_upload"),
            "step": (self._engine._runner, "step"),
            "decode": (self._engine._runner._family, "decode"),
        }[stage]
        true = getattr(owner, name)

        def faulty(*args: Any, **options: Any) -> Any:
            if times is None or self.raised < times:
                self.raised += 1
                raise error()
            return true(*args, **options)

        self._patch.setattr(owner, name, faulty)

    def disarm(self) -> None:
        """Puts everything back."""
        self._patch.undo()


@pytest.fixture(scope="module")
def core(demo_adapters: Path) -> Iterator[Core]:
    """An engine with the embedded model."""
    core = start_core("demo", demo_adapters)
    yield core
    core.stop()


@pytest.fixture
def injector(core: Core, monkeypatch: pytest.MonkeyPatch) -> Injector:
    """Injects into *core*."""
    return Injector(core.engine, monkeypatch)


def submit(core: Core, root: Path, name: str, uses: list[tuple[str, float]], **options: Any) -> EngineJob:
    """Begins a request."""
    return core.engine.submit(make_request(root, name, WANTED, uses, **options))


def failure(job: EngineJob) -> LoraServerError:
    """How the job failed."""
    with pytest.raises(LoraServerError) as caught:
        events(job)
    return caught.value


def check_books(core: Core) -> None:
    """Nothing is held by anybody once the engine is idle."""
    deadline_s = time.monotonic() + 5
    while core.manager.cache_info().leases or core.engine.queue_info().running_requests:
        assert time.monotonic() < deadline_s, "leaked"
        time.sleep(0.01)
    core.manager.check_integrity()
    core.engine.call(lambda runner, _: runner.pages.check_integrity()).result(timeout=5)
    assert not core.manager.slots._taken


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_ends_one_request_and_the_server_goes_on(
    core: Core, injector: Injector, demo_adapters: Path, stage: str
) -> None:
    """The request gets GPU_OUT_OF_MEMORY; the same request afterwards gets the very picture that it got before."""
    uses = [("a", 1.0)]
    core.engine.call(lambda *_: (core.engine._prompts.clear(), core.engine._residency.clear())).result(timeout=5)
    before = pictures(events(submit(core, demo_adapters, f"before-{stage}", uses)))
    core.engine.call(lambda *_: (core.engine._prompts.clear(), core.engine._residency.clear())).result(timeout=5)
    injector.arm(stage, lambda: torch.OutOfMemoryError("injected"))
    assert isinstance(failure(submit(core, demo_adapters, f"at-{stage}", uses)), DeviceOutOfMemoryError)
    assert injector.raised
    injector.disarm()
    check_books(core)
    after = pictures(events(submit(core, demo_adapters, f"after-{stage}", uses)))
    assert np.array_equal(before[0], after[0])
    check_books(core)
    assert core.engine.info().restarts == 0


@pytest.mark.parametrize("stage", ["encode", "step", "decode"])
def test_work_of_several_that_fails_together_is_done_one_by_one(
    core: Core, injector: Injector, monkeypatch: pytest.MonkeyPatch, demo_adapters: Path, stage: str
) -> None:
    """A batch that does not fit costs nobody a picture, if each fits alone."""
    engine: Any = core.engine
    costs = SimpleNamespace(
        switch_s=1.0, step_s=lambda *_, **__: 1.0, fastest_s=lambda _: 0.0, observe=lambda *_, **__: 0
    )
    monkeypatch.setattr(engine._stepper, "costs", costs)  # on a busy machine one image alone may look cheaper
    core.engine.call(lambda *_: core.engine._prompts.clear()).result(timeout=5)
    held = threading.Event()
    core.engine.call(lambda *_: held.wait(5))  # until all have entered, so that they start together
    jobs = [submit(core, demo_adapters, f"{stage}-{k}", []) for k in range(3)]
    injector.arm(stage, lambda: torch.OutOfMemoryError("injected"), times=1)
    held.set()
    assert all(len(pictures(events(job))) == 1 for job in jobs)
    assert injector.raised == 1
    injector.disarm()
    check_books(core)


@pytest.mark.parametrize("where", ["_step", "_use_the_wait"], ids=["between batches", "with batches under way"])
def test_an_engine_that_dies_begins_anew_with_its_queue(
    core: Core, demo_adapters: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Who runs gets ENGINE_FAILURE, who waits gets a picture, and the base weights are clean, bit for bit."""
    engine: Any = core.engine
    monkeypatch.setattr(engine, "_deaths_s", [])
    monkeypatch.setattr(engine, "_lookahead", 2)
    before, restarts = pictures(events(submit(core, demo_adapters, f"clean-{where}", []))), engine.info().restarts
    held = threading.Event()
    core.engine.call(lambda *_: held.wait(5))
    running = submit(core, demo_adapters, f"running-{where}", [("a", 1.0)])
    waiting = [submit(core, demo_adapters, f"waiting-{where}-{k}", []) for k in range(2)]
    engine._config = engine._config.model_copy(update={"max_active_images": 1})
    lives = getattr(engine, where)

    def dies_once(*launched: Any) -> None:
        if running in engine._running:
            engine._runner.merge(running.composition)  # so that the weights are not the base's
            raise SystemError("injected")
        lives(*launched)

    setattr(engine, where, dies_once)
    try:
        held.set()
        assert isinstance(failure(running), EngineFailureError)
        assert [np.array_equal(pictures(events(job))[0], before[0]) for job in waiting] == [True, True]
    finally:
        delattr(engine, where)
        engine._config = engine._config.model_copy(update={"max_active_images": 32})
    assert engine.info().restarts == restarts + 1
    assert not engine._launched
    check_books(core)


def test_an_engine_that_dies_twice_in_a_minute_gives_up(demo_adapters: Path) -> None:
    """The second death ends all requests, says so once, and takes no new ones."""
    told = threading.Event()
    core = start_core("demo", demo_adapters, on_failure=told.set)
    engine: Any = core.engine
    assert isinstance(engine, LocalEngine)

    def dies() -> None:
        raise SystemError("injected")

    engine._sweep = dies
    job = submit(core, demo_adapters, "unlucky", [])
    assert isinstance(failure(job), LoraServerError)
    assert told.wait(5)
    with pytest.raises(LoraServerError):
        submit(core, demo_adapters, "late", [])
    core.stop()
    core.manager.check_integrity()

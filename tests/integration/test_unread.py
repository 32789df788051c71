"""Images that nobody takes hold up their own tenant, and nobody for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_server.app import Core, build_core
from lora_server.config import EngineConfig, ModelConfig, ServerConfig
from lora_server.engine.job import EngineJob
from lora_server.errors import UnreadImagesError
from lora_server.types import GenerationParameters, GenerationRequest, ImageEvent

from tests.parity.engine_harness import events, pictures

MANY = GenerationParameters("a red star", "", 64, 64, 2, 4.0, 1, 4)


@pytest.fixture(scope="module")
def core(demo_adapters: Path) -> Iterator[Core]:
    """An engine that holds less than two images, and begins one at a time."""
    engine = EngineConfig(warm_sizes=(), max_unread_bytes=2_000, max_active_images=1, max_batch_images=1)
    core = build_core(ServerConfig(model=ModelConfig(device="cpu"), engine=engine, adapter_roots=(demo_adapters,)))
    yield core
    core.stop()


def submit(core: Core, name: str) -> EngineJob:
    return core.engine.submit(GenerationRequest(name, MANY))


def until(condition: object) -> None:
    """Waits until *condition* holds."""
    assert callable(condition)
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_request_that_nobody_reads_holds_up_those_behind_it_until_it_is_left(core: Core) -> None:
    """It goes on itself, so that it can be read; what waits behind it begins when its reader has gone."""
    unread = submit(core, "unread")
    reader = unread.subscribe(lambda: None)
    behind = submit(core, "behind")
    until(lambda: unread.log.complete)
    assert core.engine.queue_info().unread_bytes > 2_000
    assert behind.completed_steps <= 2 * MANY.num_images - 2  # it may have begun before too much was held
    with pytest.raises(UnreadImagesError):
        submit(core, "refused")
    stood = behind.completed_steps
    time.sleep(0.2)
    assert behind.completed_steps <= stood + MANY.num_inference_steps
    reader.close()
    assert len(pictures(events(behind))) == MANY.num_images
    until(lambda: core.engine.queue_info().unread_bytes == 0)
    assert len(pictures(events(submit(core, "refused")))) == MANY.num_images


def test_a_reader_that_is_slow_gets_everything(core: Core) -> None:
    """Its request is the oldest one that holds something, so it never waits for itself."""
    job = submit(core, "slow")
    reader = job.subscribe(lambda: None)
    found = 0
    while not reader.finished:
        found += sum(isinstance(event, ImageEvent) for event in reader.poll())
        time.sleep(0.05)
    reader.close()
    assert found == MANY.num_images
    until(lambda: core.engine.queue_info().unread_bytes == 0)


def test_images_of_two_requests_take_turns(core: Core) -> None:
    """With one place, the images of the second begin between those of the first."""
    jobs = [submit(core, name) for name in ("one", "two")]
    readers = [job.subscribe(lambda: None) for job in jobs]
    order: list[int] = []
    while not all(reader.finished for reader in readers):
        for number, reader in enumerate(readers):
            order += [number for event in reader.poll() if isinstance(event, ImageEvent)]
        time.sleep(0.001)
    for reader in readers:
        reader.close()
    assert sorted(order) == [0] * 4 + [1] * 4
    assert order.index(1) < len(order) - order[::-1].index(0)  # the second has one before the first has all

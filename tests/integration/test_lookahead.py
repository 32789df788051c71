"""Batches given to the device before the one before is done, as on CUDA: nothing is lost, doubled or reordered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lora_server.app import Core
from lora_server.errors import AdapterInUseError
from lora_server.types import (
    AdapterSource,
    ByName,
    GenerationParameters,
    ImageEvent,
    PreviewEvent,
    ProgressEvent,
    StatsEvent,
)

from tests.parity.engine_harness import events, make_request, pictures, start_core


@pytest.fixture(scope="module")
def core(demo_adapters: Path) -> Iterator[Core]:
    """An engine of the embedded model in float64."""
    core = start_core("demo", demo_adapters)
    yield core
    core.stop()


def wanted(seed: int, steps: int, **changes: object) -> GenerationParameters:
    """A small picture."""
    fields: dict[str, object] = {
        "prompt": "a big red star on a navy background", "negative_prompt": "", "width_px": 64, "height_px": 64,
        "num_inference_steps": steps, "guidance_scale": 4.0, "seed": seed, "num_images": 1,
    }  # fmt: skip
    return GenerationParameters(**{**fields, **changes})  # type: ignore[arg-type]


def draw(core: Core, root: Path, lookahead: int) -> list[list[np.ndarray]]:
    """Pictures of a mixture of requests, all under way at once."""
    core.engine._lookahead = lookahead
    mixture = [(wanted(1, 3), [("a", 1.0)]), (wanted(2, 1), []), (wanted(3, 5, num_images=3), [("b", -0.5)])]
    jobs = [
        core.engine.submit(make_request(root, f"{lookahead}-{k}", parameters, uses))
        for k, (parameters, uses) in enumerate(mixture)
    ]
    return [pictures(events(job)) for job in jobs]


def test_the_pictures_are_those_without_lookahead(core: Core, demo_adapters: Path) -> None:
    """Two batches in flight or one: the same images, every one of them once."""
    ahead, plain = draw(core, demo_adapters, 2), draw(core, demo_adapters, 1)
    assert [len(images) for images in ahead] == [1, 1, 3]
    for ours, theirs in zip(ahead, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_progress_and_previews_count_every_step_once(core: Core, demo_adapters: Path) -> None:
    """The last progress is the total, stats have all steps, and a preview is never of a finished image."""
    core.engine._lookahead = 2
    request = make_request(demo_adapters, "previews", wanted(4, 6), [("a", 1.0)], preview_interval_steps=2)
    told = events(core.engine.submit(request))
    progress = [event.completed_steps for event in told if isinstance(event, ProgressEvent)]
    assert progress == sorted(set(progress))
    assert progress[-1] == 6
    assert [event.stats.completed_steps for event in told if isinstance(event, StatsEvent)] == [6]
    assert len([event for event in told if isinstance(event, ImageEvent)]) == 1
    assert all(event.completed_steps < 6 for event in told if isinstance(event, PreviewEvent))


def test_a_cancelled_job_leaves_nothing_though_its_batch_is_in_flight(core: Core, demo_adapters: Path) -> None:
    """Its lease and slots come back, and others go on."""
    core.engine._lookahead = 2
    name = core.manager.load(AdapterSource(str(demo_adapters / "a"))).result(timeout=20).adapter.name
    long = core.engine.submit(make_request(demo_adapters, "long", wanted(5, 400), [("a", 1.0)]))
    other = core.engine.submit(make_request(demo_adapters, "other", wanted(6, 8), [("b", 1.0)]))
    subscription = long.subscribe(lambda: None)
    deadline = time.monotonic() + 20
    while not any(isinstance(event, ProgressEvent) for event in subscription.poll()) and time.monotonic() < deadline:
        time.sleep(0.01)
    subscription.close()
    assert len(pictures(events(other))) == 1
    while not unloaded(core, name) and time.monotonic() < deadline:  # refused while anybody leases it
        time.sleep(0.01)
    assert core.engine.queue_info().running_requests == 0
    assert name not in [adapter.name for adapter in core.manager.list()]
    core.manager.check_integrity()


def unloaded(core: Core, name: str) -> bool:
    """Unloads an adapter, unless it is in use."""
    try:
        core.manager.unload(ByName(name))
    except AdapterInUseError:
        return False
    return True

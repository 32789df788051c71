"""A true engine with any model: requests in, pictures out."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lora_server.app import Core, build_core
from lora_server.config import EngineConfig, ModelConfig, ServerConfig
from lora_server.engine.job import EngineJob
from lora_server.types import (
    AdapterSource,
    AdapterUse,
    GenerationEvent,
    GenerationParameters,
    GenerationRequest,
    GenerationStats,
    ImageEvent,
    StatsEvent,
)
from PIL import Image


def start_core(model: str, root: Path, side_px: int = 64, **options: Any) -> Core:
    """Starts an engine in float64 with adapters from *root*; the caller stops it. *options* go to `build_core`."""
    return build_core(
        ServerConfig(
            model=ModelConfig(model=model, device="cpu", dtype="float64"),
            engine=EngineConfig(warm_sizes=((side_px, side_px),), warm_images=(1,)),
            adapter_roots=(root,),
        ),
        **options,
    )


def make_request(
    root: Path, name: str, wanted: GenerationParameters, uses: list[tuple[str, float]], **options: Any
) -> GenerationRequest:
    """A request named *name* with adapters by their folders under *root*."""
    adapters = tuple(AdapterUse(AdapterSource(str(root / use)), scale) for use, scale in uses)
    return GenerationRequest(name, wanted, adapters, **options)


def events(job: EngineJob) -> list[GenerationEvent]:
    """All that a job tells, to its end."""
    woken = threading.Event()
    subscription = job.subscribe(woken.set)
    told: list[GenerationEvent] = []
    try:
        while not subscription.finished:
            woken.wait(timeout=20)
            woken.clear()
            told += subscription.poll()
    finally:
        subscription.close()
    return told


def pictures(told: list[GenerationEvent]) -> list[np.ndarray]:
    """The images by index, (H, W, 3)."""
    found = {event.image.index: event.image.data for event in told if isinstance(event, ImageEvent)}
    return [np.asarray(Image.open(BytesIO(found[index]))) for index in sorted(found)]


def stats(told: list[GenerationEvent]) -> GenerationStats:
    """What the request cost."""
    (found,) = [event.stats for event in told if isinstance(event, StatsEvent)]
    return found

"""Making an image again up to the point where it went wrong, with other adapters than it had.

Step by step, so that others go on between. Engine thread only.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass, replace

from lora_server.engine.batch_runner import BatchImage, BatchRunner, Decoded
from lora_server.engine.composition import Composition
from lora_server.engine.job import EngineJob
from lora_server.models.base import DenoisingState
from lora_server.types import ApplicationWay

Pause = Generator[None, None, str | None]
"""Pauses between passes through networks; returns the component that gave what is not finite, or None."""


class Stage(enum.Enum):
    """What gave a value that is not finite."""

    STEP = "step"
    PREVIEW = "preview"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Fault:
    """A value that is not finite.

    Attributes:
        job, image_index: Of which image.
        component: What gave it.
        stage: What the component was asked for; `STEP` also for what the prompts became, which the first step tells.
        steps: Steps of the image until then, that one included.
        way: How adapters were applied.
    """

    job: EngineJob
    image_index: int
    component: str
    stage: Stage
    steps: int
    way: ApplicationWay


def retrace(runner: BatchRunner, fault: Fault, members: Composition) -> Pause:
    """Makes the image of *fault* again with *members* alone, up to where the fault arose."""
    parameters = fault.job.parameters
    alone = replace(parameters, seed=parameters.seeds[fault.image_index], num_images=1)
    with runner.watching_text() as watch:
        with runner.preparing():
            conditioning = runner.condition(alone, members)
        text_encoder = watch.first_not_finite()
    yield
    (state,) = runner.begin(alone, conditioning)
    with runner.watching_text() as watch:  # pipelines without a family encode in their first step
        found = _step(runner, state, members, fault)
        if found is not None:
            return text_encoder or watch.first_not_finite() or found
    while state.step_index < fault.steps and not state.finished:
        yield
        found = _step(runner, state, members, fault)
        if found is not None:
            return found
    if fault.stage is Stage.STEP:
        return None
    yield
    return _not_finite(runner, runner.preview(state) if fault.stage is Stage.PREVIEW else runner.decode([state]))


def _step(runner: BatchRunner, state: DenoisingState, members: Composition, fault: Fault) -> str | None:
    phase = runner.phases(members, len(state.schedule.timesteps))[state.step_index]
    way = ApplicationWay.BASE
    if phase.key:
        slots = phase.takes_slots and fault.way is ApplicationWay.SLOTS
        way = ApplicationWay.SLOTS if slots else ApplicationWay.MERGED
    check = runner.step([BatchImage(state, phase.members)], way)
    runner.wait()
    return check.faulty().get(0)


def _not_finite(runner: BatchRunner, decoded: Decoded | None) -> str | None:
    runner.wait()
    return None if decoded is None else decoded.check.faulty().get(0)

"""What jobs are told of their steps: noted when a step is done, published while the device is at work on another.

Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from lora_server.engine.batch_runner import BatchRunner
from lora_server.engine.guard import Guard
from lora_server.engine.images import encode_preview
from lora_server.engine.job import EngineJob
from lora_server.engine.stepper import Advanced
from lora_server.models.base import DenoisingState
from lora_server.types import PreviewEvent, ProgressEvent


class News:
    """Progress and previews that are not published yet."""

    def __init__(
        self, runner: BatchRunner, guard: Guard, on_not_finite: Callable[[EngineJob, DenoisingState, str], None]
    ) -> None:
        """*on_not_finite* gets (job, state, component) of a preview that has no pixels."""
        self._runner = runner
        self._guard = guard
        self._on_not_finite = on_not_finite
        self._noted: list[Callable[[], None]] = []

    def note(self, job: EngineJob, advanced: Sequence[Advanced]) -> None:
        """Notes what is to be told of a step; previews are decoded now, while their latents are current."""
        request = job.request
        if job.batches % request.progress_interval_steps == 0 or job.completed_steps == job.total_steps:
            elapsed_s = time.monotonic() - job.timings.accepted_s
            event = ProgressEvent(job.completed_steps, job.total_steps, elapsed_s)
            self._noted.append(lambda: job.log.publish(event))
        interval = request.preview_interval_steps
        for member in advanced:
            if interval and member.step_index % interval == 0 and not member.finished:
                self._guard.alone(job, partial(self._note_preview, job, member.image.state), "preview")

    def publish(self) -> None:
        """Tells what was noted."""
        noted, self._noted = self._noted, []
        for tell in noted:
            tell()

    def clear(self) -> None:
        """Forgets what was noted."""
        self._noted.clear()

    def _note_preview(self, job: EngineJob, state: DenoisingState) -> None:
        decoded, done = self._runner.preview(state), state.step_index
        if decoded is None:
            return
        pixels = decoded.pixels[0].cpu().numpy()  # waits for the device
        faulty = decoded.check.faulty()
        if faulty:
            self._on_not_finite(job, state, faulty[0])
        else:
            self._noted.append(lambda: job.log.publish(PreviewEvent(state.image_index, done, encode_preview(pixels))))

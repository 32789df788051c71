"""The last leg of a job, on worker threads: pixels become files, files become events, the last one ends the job.

So neither the engine thread nor the event loop ever waits for an encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from lora_server.engine.images import encode_image
from lora_server.engine.job import EngineJob
from lora_server.errors import EngineFailureError, LoraServerError
from lora_server.types import ImageEvent, Provenance, StatsEvent

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What is the same in the provenance of every image of this server."""

    model: str
    software: str
    prompt_metadata: bool = True


class Finisher:
    """Encodes decoded images and completes their jobs."""

    def __init__(self, origin: Origin, on_done: Callable[[EngineJob, LoraServerError | None], None]) -> None:
        """*on_done* is called from a worker thread, once a job, after its last event or its error."""
        self._origin = origin
        self._on_done = on_done
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encoder")

    def submit(self, job: EngineJob, index: int, pixels: NDArray[np.uint8]) -> None:
        """Takes image *index* of *job*, (height_px, width_px, 3); returns at once."""
        self._workers.submit(self._finish, job, index, pixels)

    def stop(self) -> None:
        """Finishes what was submitted, then ends the workers. Idempotent."""
        self._workers.shutdown(wait=True)

    def _finish(self, job: EngineJob, index: int, pixels: NDArray[np.uint8]) -> None:
        try:
            began_s = time.monotonic()
            image = encode_image(
                index,
                pixels,
                job.request.format,
                self._provenance(job, index),
                prompt_metadata=self._origin.prompt_metadata,
            )
        except Exception:
            _log.exception("image encoding failed", request_id=job.request.request_id)
            self._on_done(job, EngineFailureError(job.request.request_id))
            return
        job.log.publish(ImageEvent(image))  # before the count, or another worker could end the job without it
        now_s = time.monotonic()
        with job.finish_lock:
            job.timings.image_encode_s += now_s - began_s
            job.images_left -= 1
            last = job.images_left == 0
        if last:
            job.log.publish(StatsEvent(job.stats(now_s)))
            self._on_done(job, None)

    def _provenance(self, job: EngineJob, index: int) -> Provenance:
        parameters = job.parameters
        return Provenance(
            model=self._origin.model,
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            seed=parameters.seeds[index],
            num_inference_steps=parameters.num_inference_steps,
            guidance_scale=parameters.guidance_scale,
            width_px=parameters.width_px,
            height_px=parameters.height_px,
            adapters=tuple(job.applied),
            software=self._origin.software,
            skip_layer_guidance=parameters.skip_layer_guidance,
            scheduler=parameters.scheduler,
            true_cfg_scale=parameters.true_cfg_scale if parameters.true_cfg_scale > 1 else None,
            prompt_truncations=job.truncations,
        )

"""Finished latents on their way to pixels: on a stream of their own, so that others step on meanwhile.

On the CPU there is no second stream, and decoding is done at once. Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lora_server.engine.batch_runner import BatchRunner
from lora_server.engine.job import EngineJob
from lora_server.models.base import DenoisingState
from lora_server.models.finite import FiniteCheck

_MAX_BATCH_LATENTS = 128 * 128
"""Latent pixels decoded together: what one image of 1024 px has."""

Finished = tuple[EngineJob, DenoisingState]


@dataclass(frozen=True, slots=True)
class _Pending:
    images: Sequence[Finished]
    pixels: torch.Tensor
    check: FiniteCheck
    event: torch.cuda.Event | None
    began_s: float
    keep: object


class Decoder:
    """Images that are being decoded."""

    def __init__(
        self,
        runner: BatchRunner,
        device: torch.device,
        on_pixels: Callable[..., None],
        on_not_finite: Callable[[EngineJob, DenoisingState, str], None],
    ) -> None:
        """*on_pixels* gets (job, state, pixels (height_px, width_px, 3), seconds of decoding), on the engine thread.

        *on_not_finite* gets (job, state, component) of what has no pixels.
        """
        self._runner = runner
        self._on_pixels = on_pixels
        self._on_not_finite = on_not_finite
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    @staticmethod
    def batches(images: Sequence[Finished]) -> list[Sequence[Finished]]:
        """Splits images of one shape into as few batches as memory allows."""
        height, width = images[0][1].latents.shape[2:]
        step = max(1, _MAX_BATCH_LATENTS // (height * width))
        return [images[first : first + step] for first in range(0, len(images), step)]

    def clear(self) -> None:
        """Forgets what is being decoded."""
        self._pending.clear()

    def collect(self, *, wait: bool = False) -> None:
        """Hands over what is decoded; with *wait*, blocks until everything is."""
        while self._pending and (wait or _ready(self._pending[0])):
            done = self._pending.pop(0)
            if done.event is not None:
                done.event.synchronize()
            seconds = (time.monotonic() - done.began_s) / len(done.images)
            arrays: NDArray[np.uint8] = done.pixels.numpy()
            faulty = done.check.faulty()
            for k, ((job, state), pixels) in enumerate(zip(done.images, arrays, strict=True)):
                if k in faulty:
                    self._on_not_finite(job, state, faulty[k])
                else:
                    self._on_pixels(job, state, pixels, seconds)

    def start(self, images: Sequence[Finished]) -> None:
        """Begins to decode one batch of images of one shape."""
        began_s = time.monotonic()
        states = [state for _, state in images]
        if self._stream is None:
            decoded = self._runner.decode(states)
            self._pending.append(_Pending(images, decoded.pixels, decoded.check, None, began_s, None))
            self.collect()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            decoded = self._runner.decode(states)
            on_device = decoded.pixels
            pixels = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            pixels.copy_(on_device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        # What the second stream reads must outlive the event.
        self._pending.append(_Pending(images, pixels, decoded.check, event, began_s, (states, on_device)))


def _ready(pending: _Pending) -> bool:
    return pending.event is None or pending.event.query()

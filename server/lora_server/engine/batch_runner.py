"""Runs the model for the engine: encode, step, preview, decode, each with the right adapters in the weights.

The only caller of the model family and of the mergers; lives on the engine thread. Does not know queues or events.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_server.models.base import Conditioning, DenoisingState, ModelFamily
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.types import GenerationParameters

_MAX_PREVIEW_SIDE_LATENTS = 32

Composition = Sequence[ScaledAdapter]


class BatchRunner:
    """The model with its mergers, in the verbs of the engine.

    Every method leaves the weights as the last composition made them, and every method sets the composition that it
    needs first: nobody relies on what was there before.
    """

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._mergers = {name: WeightMerger(name, root) for name, root in family.components.items()}

    def encode(self, parameters: GenerationParameters, composition: Composition) -> Conditioning:
        """Encodes the prompts with the composition in the text encoders."""
        for component, merger in self._mergers.items():
            if component != self._family.denoiser:
                merger.apply(composition)
        return self._family.encode(parameters)

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the request's images at pure noise."""
        return self._family.begin(parameters, conditioning)

    def step(self, states: Sequence[DenoisingState], composition: Composition) -> None:
        """Advances *states*, which share the composition, by one step in one batch."""
        self._mergers[self._family.denoiser].apply(composition)
        self._family.step(states)
        if self._family.device.type == "cuda":
            torch.cuda.synchronize(self._family.device)  # so that cancels, progress and timings are of this step

    def decode(self, state: DenoisingState) -> NDArray[np.uint8]:
        """Decodes a finished image to pixels, (height_px, width_px, 3)."""
        return self._family.decode(state.latents)

    def preview(self, state: DenoisingState) -> NDArray[np.uint8]:
        """Decodes the model's present estimate of an image, made small first so that it costs the same at any size."""
        estimate = state.latents if state.denoised is None else state.denoised
        excess = max(estimate.shape[-2:]) / _MAX_PREVIEW_SIDE_LATENTS
        if excess > 1:
            size = [max(1, round(side / excess)) for side in estimate.shape[-2:]]
            estimate = torch.nn.functional.interpolate(estimate, size=size, mode="area")
        return self._family.decode(estimate)

    def restore(self) -> None:
        """Puts the base weights back everywhere, bit for bit."""
        for merger in self._mergers.values():
            merger.apply(())

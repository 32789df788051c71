"""The protocol of one model family, and the denoising state that it steps.

A family knows how its model encodes prompts, draws initial noise, steps and decodes. It does not know requests,
queues, caches or adapters: those change the weights of its components from outside (`models.merge`), between calls.
All methods run on the engine thread; none is thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lora_server.models.weights import AdapterTargets, LinearShape
from lora_server.types import GenerationParameters, ModelInfo


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """What the text encoders say of one prompt.

    Attributes:
        tokens: (1, T, C), one vector a text token.
        pooled: (1, P), one vector for the whole prompt.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The embeddings that steer one request; *negative* only where guidance acts."""

    positive: PromptEmbedding
    negative: PromptEmbedding | None


@dataclass(frozen=True, slots=True)
class StepSchedule:
    """The noise levels that an image passes through.

    Attributes:
        timesteps: (N,) float32 on the CPU, what the denoiser is told at each of N steps.
        sigmas: (N + 1,) float32 on the CPU, noise level before each step, and after the last.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor


@dataclass(slots=True, eq=False)
class DenoisingState:
    """One image on its way from noise to picture; owned by the engine thread, compared by identity.

    Attributes:
        parameters: What to draw; shared by the images of a request.
        image_index: The image's index in its request, from 0.
        conditioning: Shared by the images of a request.
        schedule: The noise levels.
        latents: (1, C, H, W), at least float32.
        step_index: Steps done, 0 to N.
        denoised: The model's latest estimate of the final latents, of the same shape; None before the first step.
    """

    parameters: GenerationParameters
    image_index: int
    conditioning: Conditioning
    schedule: StepSchedule
    latents: torch.Tensor
    step_index: int = 0
    denoised: torch.Tensor | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step_index >= len(self.schedule.timesteps)


class ModelFamily(Protocol):
    """One loaded model, in the words that the engine uses."""

    @property
    def info(self) -> ModelInfo:
        """What the server says of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the arithmetic."""
        ...

    @property
    def denoiser(self) -> str:
        """Name of the component that steps, such as `transformer`; the other adaptable ones encode text."""
        ...

    @property
    def components(self) -> Mapping[str, torch.nn.Module]:
        """The components that adapters may change, by the pipeline's names."""
        ...

    def encode(self, parameters: GenerationParameters) -> Conditioning:
        """Encodes the prompts of a request with the text encoders as they are now."""
        ...

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise.

        Image k draws its noise in float32 from its own CPU generator, seeded with seed + k, so that it does not
        depend on the device, on the type, or on the images beside it.
        """
        ...

    def step(self, states: Sequence[DenoisingState]) -> None:
        """Advances every state by one denoising step, all in one batch; mutates them.

        The states must be compatible: equal latent shapes and text lengths. They may differ in everything else.
        """
        ...

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Decodes latents of one image, (1, C, H, W), to pixels, (height_px, width_px, 3)."""
        ...


def adapter_targets(components: Mapping[str, torch.nn.Module]) -> AdapterTargets:
    """Lists every linear module of the components, which is what adapters may change."""
    return {
        component: {
            path: LinearShape(module.out_features, module.in_features)
            for path, module in root.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for component, root in components.items()
    }

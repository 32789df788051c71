"""The protocol of one model family, and the denoising state that it steps.

A family knows how its model encodes prompts, draws initial noise, steps and decodes. It does not know requests,
queues, caches or adapters: those change its components from outside (`models.merge`, `models.lora_linear`). All
methods run on the engine thread; none is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lora_server.models.linear_store import linear_shapes
from lora_server.models.weights import AdapterTargets
from lora_server.types import GenerationParameters, ModelInfo, PromptTruncation


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to encode; *negative* ones steer away, which some families encode differently."""

    text: str
    negative: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbedding:
    """What the text encoders say of one prompt.

    Attributes:
        tensors: By the family's own names, each of one row, (1, ...); only the family reads them.
        batch_shape: What embeddings must share for their rows to be in one batch. None: the shapes of all tensors.
            A family that pads texts of different lengths in its step gives the padded length here.
        truncations: What tokenizers cut off the prompt; where a pipeline encodes by itself, known after its first step.
    """

    tensors: Mapping[str, torch.Tensor]
    batch_shape: Hashable = None
    truncations: Sequence[PromptTruncation] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        return self.tensors[name]

    @property
    def shape(self) -> Hashable:
        """Rows whose embeddings have equal shapes can be in one batch."""
        if self.batch_shape is not None:
            return self.batch_shape
        return tuple(sorted((name, tuple(tensor.shape[1:])) for name, tensor in self.tensors.items()))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The embeddings that steer one request; *negative* only where the family takes a second row for guidance."""

    positive: PromptEmbedding
    negative: PromptEmbedding | None

    @property
    def truncations(self) -> tuple[Sequence[PromptTruncation], ...]:
        """What tokenizers cut off each prompt."""
        return tuple(each.truncations for each in (self.positive, self.negative) if each is not None)

    @property
    def shape(self) -> Hashable:
        """The shapes of its rows; with and without a negative of the same shape it is the same."""
        return frozenset(each.shape for each in (self.positive, self.negative) if each is not None)


class StepSchedule(Protocol):
    """How one image goes from noise to picture; `models.schedules` has them."""

    @property
    def timesteps(self) -> torch.Tensor:
        """(N,) on the CPU, what the denoiser is told at each of N steps."""
        ...


@dataclass(slots=True, eq=False)
class DenoisingState:
    """One image on its way from noise to picture; owned by the engine thread, compared by identity.

    Attributes:
        parameters: What to draw; shared by the images of a request.
        image_index: The image's index in its request, from 0.
        conditioning: Shared by the images of a request.
        schedule: The image's own way through the noise levels, with its history and its noise if it has any.
        latents: (1, C, H, W), at least float32, whatever form the denoiser takes them in.
        rows: Rows that a step of this image takes: 2 with a negative one for guidance, else 1.
        step_index: Steps done, 0 to N.
        denoised: The model's latest estimate of the final latents, of the same shape; None before the first step.
        peaks: What networks gave at the last step that did not go through `denoise` (`models.finite`): components with
            peaks, (1,), on the device.
    """

    parameters: GenerationParameters
    image_index: int
    conditioning: Conditioning
    schedule: StepSchedule
    latents: torch.Tensor
    rows: int = 1
    step_index: int = 0
    denoised: torch.Tensor | None = None
    peaks: Sequence[tuple[str, torch.Tensor]] = ()

    @property
    def timestep(self) -> torch.Tensor:
        """What the denoiser is told at the next step, a scalar on the CPU."""
        return self.schedule.timesteps[self.step_index]

    @property
    def remaining_steps(self) -> int:
        """Steps left."""
        return len(self.schedule.timesteps) - self.step_index

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.remaining_steps <= 0

    @property
    def latent_pixels(self) -> int:
        """Latent height and width times rows, which a step's memory grows with."""
        return self.latents.shape[2] * self.latents.shape[3] * self.rows

    @property
    def shape(self) -> Hashable:
        """States of equal shape can step together: latent height and width, and text length."""
        return (*self.latents.shape[2:], self.conditioning.shape)


Denoise = Callable[[Sequence[DenoisingState], Mapping[str, torch.Tensor], Mapping[str, Any]], torch.Tensor]
"""One forward pass: (the state of each row, inputs of B rows by name, other options) to the prediction, (B, ...).

The engine gives it to the family, with the adapters of each row already in place. Inputs are flat tensors, whatever
the network takes: graphs are captured for their names and shapes, and `ModelFamily.forward` gives them their form."""


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

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The repeated blocks of the denoiser, which are compiled one by one."""
        ...

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The module in which decoding spends its time, of one tensor in and one out; None if there is no such one.

        It is compiled on CUDA.
        """
        ...

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Nested sets of the denoiser's modules, the most commonly adapted ones first, all of *paths* last."""
        ...

    def guides(self, parameters: GenerationParameters) -> bool:
        """Whether images of *parameters* take a second, negative row, whose prompt is to be encoded too."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch, with the text encoders as they are now."""
        ...

    def truncations(self, prompt: Prompt) -> Sequence[PromptTruncation]:
        """Returns what the tokenizers cut off *prompt* when it is encoded, one for each encoder that reads less."""
        ...

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise.

        Image k draws its noise in float32 from its own CPU generator, seeded with seed + k, so that it does not
        depend on the device, on the type, or on the images beside it.
        """
        ...

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one denoising step, all in one batch; mutates them, all or (if it raises) none.

        The states have equal `shape`. They may differ in everything else.
        """
        ...

    def forward(self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
        """Runs the denoising network on what `step` gave to its `denoise`; returns the prediction, (B, ...).

        Pure tensor code without a look at values: it is captured into CUDA graphs. The place to nest, split or list
        inputs for networks that do not take flat tensors of B rows.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents, (B, C, H, W), to images on the device, (B, 3, height_px, width_px).

        From -1 to 1, as the autoencoder gives them, neither clamped nor rounded: the caller asks whether they are
        finite. What has its pixels already may return them, uint8.
        """
        ...


def adapter_targets(components: Mapping[str, torch.nn.Module]) -> AdapterTargets:
    """Lists every linear and convolution of the components, which is what adapters may change."""
    return {component: linear_shapes(root) for component, root in components.items()}

"""What the families of one transformer on a rectified flow share: FLUX.1, Qwen-Image, Z-Image.

Their latents go into the network in patches of 2 x 2. Between steps they stay images, (1, C, H, W), as everybody's:
a family packs them inside its `forward`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lora_server.models.autoencoder import lay_out_autoencoder
from lora_server.models.base import Conditioning, Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.fused_gelu import fuse_gelus
from lora_server.models.guidance import Row
from lora_server.models.prompt_length import TextLimit, truncations
from lora_server.models.schedules import Start, begin_states
from lora_server.models.settings import FamilyDefaults, ModelSettings
from lora_server.types import GenerationParameters, GuidanceKind, ModelInfo, PromptTruncation

PATCH = 2
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_NO_LIMIT_PX = 2**16
"""For positions that are computed and not looked up."""


class FlowFamily(ABC):
    """The common part of a `ModelFamily`; subclasses say how they encode, step, run their network and decode."""

    denoiser = "transformer"
    family: ClassVar[str]
    pipeline_class: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a pipeline, already on its device and in its type; owns it from now on.

        Raises:
            ValueError: If its scheduler is not the one of these families.
        """
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != _SCHEDULER:
            raise ValueError(f"its scheduler is a {scheduler}; this family takes a {_SCHEDULER}")
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._settings = settings
        self._name = name
        fuse_gelus(self._transformer)
        if not self._decodes_videos:
            lay_out_autoencoder(pipeline.vae)
        self._vae_dtype = pipeline.vae.dtype

    @property
    @abstractmethod
    def published(self) -> FamilyDefaults:
        """What its authors recommend; a model's `lora_inference.json` goes before it."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The repeated blocks of the transformer."""

    @abstractmethod
    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Nested sets of the transformer's linears, the most commonly adapted ones first."""

    @property
    def max_side_px(self) -> int:
        """The largest side that the network can position."""
        return _NO_LIMIT_PX

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The decoder of the autoencoder, unless it is one of videos, which keeps what it has seen of other frames."""
        return None if self._decodes_videos else self._pipeline.vae.decoder

    @property
    def _decodes_videos(self) -> bool:
        return any(parameter.ndim == 5 for parameter in self._pipeline.vae.parameters())

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are; asked at every step, and diffusers looks through all modules to answer."""
        return torch.device(self._transformer.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the arithmetic; kept as the device is."""
        dtype = self._transformer.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def components(self) -> Mapping[str, torch.nn.Module]:
        """The transformer and the text encoders."""
        return {name: getattr(self._pipeline, name) for name in (*self.text_encoders, self.denoiser)}

    @property
    def info(self) -> ModelInfo:
        """What the server says of the model."""
        return ModelInfo(
            name=self._name,
            family=self.family,
            pipeline_class=self.pipeline_class,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            defaults=self._settings.defaults(self.published),
            size_multiple_px=PATCH * self._pipeline.vae_scale_factor,
            max_side_px=self.max_side_px,
            adaptable_components=tuple(sorted(self.components)),
            guidance=self.guidance,
            guidance_threshold=self.guidance_threshold,
        )

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of a text."""
        length = self._settings.max_sequence_length or self.published.max_sequence_length
        assert length is not None
        return length

    guidance_threshold: ClassVar[float] = 1.0
    """Guidance acts over this scale."""

    @property
    def guidance(self) -> GuidanceKind:
        """What the guidance scale of a request does."""
        return GuidanceKind.CLASSIFIER_FREE

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        factor = self._pipeline.vae_scale_factor
        height, width = parameters.height_px // factor, parameters.width_px // factor
        shape = (1, self.latent_channels, height, width)
        options = flow_options(self._pipeline.scheduler, (height // PATCH) * (width // PATCH), parameters)
        return begin_states(self, parameters, conditioning, Start(self._pipeline.scheduler, shape, options))

    @property
    def latent_channels(self) -> int:
        """C, channels of the latents; the network sees four times as many."""
        return int(self._transformer.config.in_channels) // PATCH**2

    @abstractmethod
    def guides(self, parameters: GenerationParameters) -> bool:
        """Whether images of *parameters* take a second, negative row."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts with the text encoders as they are now."""

    @abstractmethod
    def text_limits(self) -> Sequence[TextLimit]:
        """How much of a prompt each text encoder reads."""

    def truncations(self, prompt: Prompt) -> Sequence[PromptTruncation]:
        """Returns what the tokenizers cut off."""
        return truncations(self.text_limits(), prompt)

    @abstractmethod
    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Runs the transformer on what `step` gave to its `denoise`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents, (B, C, H, W), to images as the autoencoder gives them, (B, 3, height_px, width_px)."""
        vae = self._pipeline.vae
        unscaled = latents.to(self._vae_dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return image


def flow_options(scheduler: Any, tokens: int, parameters: GenerationParameters) -> dict[str, Any]:
    """What the schedulers of these pipelines get beside the number of steps: noise levels, and a shift by size."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    steps, config = parameters.num_inference_steps, scheduler.config
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    options: dict[str, Any] = {"mu": calculate_shift(tokens, *(config.get(n, v) for n, v in names.items()))}
    if not config.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    return options


def of_rows(latents: Tensor, rows: Sequence[Row]) -> Tensor:
    """The latents of each row's state, (rows, C, H, W)."""
    return torch.cat([latents[row.index : row.index + 1] for row in rows])


def pack(latents: Tensor) -> Tensor:
    """Packs images, (B, C, H, W), into patches, (B, H/2 * W/2, 4C), channels first."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of *height* and *width*."""
    patches = packed.unflatten(-1, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    latents: Tensor = patches.permute(0, 3, 1, 4, 2, 5).reshape(packed.shape[0], -1, height, width)
    return latents

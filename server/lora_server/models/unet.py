"""What the UNet families share: a `UNet2DConditionModel`, a KL autoencoder, and any scheduler of diffusers.

Equals diffusers' pipelines (the oracle of tests/parity), with the loop turned inside out: one call is one step of a
batch whose rows may stand at different timesteps of different schedulers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from lora_server.models.autoencoder import lay_out_autoencoder
from lora_server.models.base import Conditioning, Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.guidance import Row, guidance_rows, guided
from lora_server.models.prompt_length import TextLimit, truncations
from lora_server.models.schedulers import check_scheduler, choose_scheduler, supported
from lora_server.models.schedules import Start, advance, begin_states, model_latents
from lora_server.models.settings import FamilyDefaults, ModelSettings
from lora_server.models.unet_attention import project_attention_together
from lora_server.types import GenerationParameters, ModelInfo, PromptTruncation

_MAX_SIDE_PX = 4096
"""A convolutional network has no limit of its own; beyond this nobody has trained one."""
_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


class UNetFamily(ABC):
    """A loaded UNet pipeline as a `ModelFamily`; subclasses add how prompts become embeddings."""

    denoiser = "unet"
    text_encoders: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a pipeline of diffusers, already on its device and in its type; owns it from now on.

        Raises:
            ValueError: If its scheduler is not one of those that are known to work.
        """
        if settings.scheduler is not None:
            pipeline.scheduler = choose_scheduler(pipeline.scheduler, settings.scheduler)
        check_scheduler(pipeline.scheduler)
        self._pipeline = pipeline
        self._unet = pipeline.unet
        self._name = name
        self._settings = settings
        project_attention_together(self._unet)
        lay_out_autoencoder(pipeline.vae)
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)  # it overflows in float16
        self._vae_dtype = pipeline.vae.dtype

    @property
    @abstractmethod
    def family(self) -> str:
        """The family's name."""

    @property
    @abstractmethod
    def defaults(self) -> FamilyDefaults:
        """What a request that says nothing gets if the model's folder says nothing either."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts; each embedding has `tokens`, (1, T, C), and whatever `conditions` reads."""

    def truncations(self, prompt: Prompt) -> Sequence[PromptTruncation]:
        """Returns what the tokenizers cut off, each at its own length."""
        named = [
            (name, getattr(self._pipeline, name.replace("text_encoder", "tokenizer"))) for name in self.text_encoders
        ]
        limits = [TextLimit(name, each, each.model_max_length) for name, each in named if each is not None]
        return truncations(limits, prompt)

    def conditions(self, states: Sequence[DenoisingState], rows: Sequence[Row]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """What the network gets of each row beside latents, timestep and tokens."""
        return {}

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are; asked at every step, and diffusers looks through all modules to answer."""
        return torch.device(self._unet.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the arithmetic; kept as the device is."""
        dtype = self._unet.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def components(self) -> Mapping[str, torch.nn.Module]:
        """The text encoders that the folder has, and the UNet."""
        names = (*self.text_encoders, self.denoiser)
        return {name: module for name in names if (module := getattr(self._pipeline, name)) is not None}

    @property
    def info(self) -> ModelInfo:
        """What the server says of the model."""
        return ModelInfo(
            name=self._name,
            family=self.family,
            pipeline_class=type(self._pipeline).__name__,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            defaults=self._settings.defaults(self.defaults),
            size_multiple_px=self._pipeline.vae_scale_factor,  # the UNet pads what its levels do not divide
            max_side_px=_MAX_SIDE_PX,
            adaptable_components=tuple(sorted(self.components)),
            schedulers=supported(self._pipeline.scheduler),
            negative_prompts=self._unet.config.time_cond_proj_dim is None,  # else guidance is distilled, as for LCM
        )

    @property
    def native_side_px(self) -> int:
        """Width and height that the UNet was trained at."""
        side = self._unet.config.sample_size
        return int(side if isinstance(side, int) else side[0]) * int(self._pipeline.vae_scale_factor)

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The transformer and residual blocks."""
        return [module for module in self._unet.modules() if type(module).__name__ in _BLOCKS]

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder of the autoencoder."""
        decoder: torch.nn.Module = self._pipeline.vae.decoder
        return decoder

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; the transformers with their feed-forward and projections; everything, convolutions too."""
        transformers = frozenset(path for path in paths if ".attentions." in path)
        attention = frozenset(path for path in transformers if ".attn1." in path or ".attn2." in path)
        return attention, transformers, frozenset(paths)

    def guides(self, parameters: GenerationParameters) -> bool:
        """Over a guidance scale of 1, unless guidance is distilled into the network."""
        return parameters.uses_guidance and self._unet.config.time_cond_proj_dim is None

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        factor = self._pipeline.vae_scale_factor
        size = parameters.height_px // factor, parameters.width_px // factor
        shape = (1, self._unet.config.in_channels, *size)
        scheduler = choose_scheduler(self._pipeline.scheduler, parameters.scheduler)
        return begin_states(self, parameters, conditioning, Start(scheduler, shape))

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step: predicts, guides, and lets each one's scheduler step."""
        latents = model_latents(states)
        rows = guidance_rows(states)
        owners = [states[row.index] for row in rows]
        # Not `latents.dtype`: between steps the latents keep more digits than half types have.
        inputs = {
            "sample": torch.cat([latents[row.index : row.index + 1] for row in rows]).to(self.dtype),
            "timestep": torch.stack([owner.timestep.float() for owner in owners]).to(self.device, non_blocking=True),
            "encoder_hidden_states": torch.cat([row.embedding["tokens"] for row in rows]),
            **self._distilled_guidance(owners),
            **self.conditions(states, rows),
        }
        predictions = denoise(owners, inputs, {}).to(latents.dtype)
        advance(states, guided(states, predictions))

    def forward(self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
        """Runs the UNet."""
        prediction: torch.Tensor = self._unet(**inputs, **options, return_dict=False)[0]
        return prediction

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents, (B, C, H, W), to images as the autoencoder gives them, (B, 3, height_px, width_px)."""
        vae = self._pipeline.vae
        image: torch.Tensor = vae.decode(self.unscaled(latents.to(self._vae_dtype)), return_dict=False)[0]
        return image

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the latents at the scale of the autoencoder."""
        return latents / float(self._pipeline.vae.config.scaling_factor)

    def _distilled_guidance(self, owners: Sequence[DenoisingState]) -> dict[str, torch.Tensor]:
        """The guidance scale as an embedding, for networks that guidance was distilled into."""
        width = self._unet.config.time_cond_proj_dim
        if width is None:
            return {}
        scales = torch.tensor([owner.parameters.guidance_scale - 1 for owner in owners])
        embedding = self._pipeline.get_guidance_scale_embedding(scales, embedding_dim=width)
        return {"timestep_cond": embedding.to(self.device, self.dtype)}

"""The families of Stable Diffusion 1.x and 2.x: one CLIP encoder; predict noise, or velocity (2.1 at 768 px).

Equals diffusers' `StableDiffusionPipeline`. The safety checker is not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_server.models.base import Prompt, PromptEmbedding
from lora_server.models.settings import FamilyDefaults
from lora_server.models.unet import UNetFamily

_SD2_TEXT_FEATURES = 1024


class StableDiffusion(UNetFamily):
    """A loaded SD 1.x or 2.x pipeline as a `ModelFamily`."""

    text_encoders = ("text_encoder",)

    @property
    def family(self) -> str:
        """By the text encoder, OpenCLIP's in 2.x: adapters of the two do not fit each other."""
        return "sd2" if self._unet.config.cross_attention_dim == _SD2_TEXT_FEATURES else "sd1"

    @property
    def defaults(self) -> FamilyDefaults:
        """The pipeline's own."""
        return FamilyDefaults(self.native_side_px, num_inference_steps=50, guidance_scale=7.5)

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch, with the text encoder as it is now; negative ones no differently."""
        tokens, _ = self._pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return [PromptEmbedding({"tokens": each}) for each in torch.split(tokens, 1)]

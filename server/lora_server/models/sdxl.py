"""The family of SDXL: two CLIP encoders, whose penultimate layers the UNet reads, and conditions on the image's size.

Equals diffusers' `StableDiffusionXLPipeline` with its own defaults: no crop, original size = target size = the image's,
and no watermark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_server.models.base import DenoisingState, Prompt, PromptEmbedding
from lora_server.models.guidance import Row
from lora_server.models.settings import FamilyDefaults
from lora_server.models.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """A loaded SDXL pipeline as a `ModelFamily`."""

    text_encoders = ("text_encoder", "text_encoder_2")
    family = "sdxl"

    @property
    def defaults(self) -> FamilyDefaults:
        """The pipeline's own."""
        return FamilyDefaults(self.native_side_px, num_inference_steps=50, guidance_scale=5.0)

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch, with the text encoders as they are now.

        An empty negative prompt is zeros for models that were trained so (`force_zeros_for_empty_prompt`).
        """
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        for k, prompt in enumerate(prompts):
            if prompt.negative and not prompt.text and self._pipeline.config.force_zeros_for_empty_prompt:
                tokens[k], pooled[k] = 0, 0
        return [
            PromptEmbedding({"tokens": tokens[k : k + 1], "pooled": pooled[k : k + 1]}) for k in range(len(prompts))
        ]

    def conditions(self, states: Sequence[DenoisingState], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The pooled prompt; original size, crop and target size, each (height, width), (rows, 6)."""
        sizes = [(states[row.index].parameters.height_px, states[row.index].parameters.width_px) for row in rows]
        time_ids = torch.tensor([(*size, 0, 0, *size) for size in sizes], dtype=self.dtype)
        return {
            "text_embeds": torch.cat([row.embedding["pooled"] for row in rows]),
            "time_ids": time_ids.to(self.device, non_blocking=True),
        }

    def forward(self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
        """Runs the UNet, which takes its own conditions in a nest."""
        added = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
        flat = {name: value for name, value in inputs.items() if name not in added}
        return super().forward({**flat}, {**options, "added_cond_kwargs": added})

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the latents at the scale of the autoencoder, which may have a mean and deviation by channel."""
        config = self._pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super().unscaled(latents)
        shift = torch.tensor(mean).view(1, -1, 1, 1).to(latents)
        return latents * torch.tensor(deviation).view(1, -1, 1, 1).to(latents) / float(config.scaling_factor) + shift

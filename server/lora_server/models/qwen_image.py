"""The family of Qwen-Image: one language model for the text, texts of any length, guidance that keeps the norm.

Equals diffusers' `QwenImagePipeline` (the oracle of tests/parity), where the guidance scale is called `true_cfg_scale`.
Texts of one batch are padded to the longest and masked, so requests with different prompts share steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_server.models.base import Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.flow_family import PATCH, FlowFamily, of_rows, pack, unpack
from lora_server.models.guidance import Row, guidance_rows, guided, positive
from lora_server.models.prompt_length import TextLimit
from lora_server.models.schedules import advance, model_latents
from lora_server.models.settings import FamilyDefaults
from lora_server.types import GenerationParameters

_TEXT_MULTIPLE_ON_CUDA = 64
"""Texts are padded to multiples of this, so that there are few shapes to capture."""


class QwenImage(FlowFamily):
    """A loaded Qwen-Image pipeline as a `ModelFamily`."""

    family = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    text_encoders = ("text_encoder",)
    published = FamilyDefaults(side_px=1328, num_inference_steps=50, guidance_scale=4.0, max_sequence_length=512)

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The transformer blocks."""
        return list(self._transformer.transformer_blocks)

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; attention and feed-forward; everything."""
        attention = frozenset(path for path in paths if ".attn." in path)
        feed_forward = frozenset(path for path in paths if "_mlp." in path)
        return attention, attention | feed_forward, frozenset(paths)

    def guides(self, parameters: GenerationParameters) -> bool:
        """Over a guidance scale of 1."""
        return parameters.uses_guidance

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch; each keeps as many tokens as it has."""
        tokens, mask = self._pipeline.encode_prompt(
            prompt=[prompt.text for prompt in prompts],
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        lengths = [tokens.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return [
            PromptEmbedding({"tokens": tokens[k : k + 1, :length].clone()}, batch_shape="padded")
            for k, length in enumerate(lengths)
        ]

    def text_limits(self) -> Sequence[TextLimit]:
        """The template in front of the prompt does not count; what is behind it does."""
        pipeline = self._pipeline
        template = pipeline.prompt_template_encode
        return [
            TextLimit(
                "text_encoder",
                pipeline.tokenizer,
                min(pipeline.tokenizer_max_length, self.max_sequence_length),
                wrap=lambda text: (template.format(text), template.index("{}")),
                skipped=pipeline.prompt_template_encode_start_idx,
            )
        ]

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step."""
        latents, rows = model_latents(states), guidance_rows(states)
        owners = [states[row.index] for row in rows]
        timesteps = torch.stack([owner.timestep for owner in owners]).to(self.device, non_blocking=True)
        inputs = {
            "latents": of_rows(latents, rows).to(self.dtype),
            "timestep": timesteps.to(self.dtype) / 1000,
            **self._texts(rows),
        }
        predictions = denoise(owners, inputs, {}).to(latents.dtype)
        velocity = _with_norm_of(positive(states, predictions), guided(states, predictions), states)
        advance(states, velocity)

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Packs the latents, runs the transformer, and unpacks its prediction."""
        latents = inputs["latents"]
        height, width = latents.shape[2:]
        velocity = self._transformer(
            hidden_states=pack(latents),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["tokens"],
            encoder_hidden_states_mask=inputs.get("mask"),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
            return_dict=False,
            **options,
        )[0]
        return unpack(velocity, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents, (B, C, H, W), as videos of one frame, to (B, 3, height_px, width_px)."""
        vae = self._pipeline.vae
        frames = latents[:, :, None].to(self._vae_dtype)
        # In float32 first, and by division: diffusers rounds so.
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(frames)
        factor = (1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)).to(frames)
        image: Tensor = vae.decode(frames / factor + mean, return_dict=False)[0][:, :, 0]
        return image

    def _texts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The texts of the rows, padded to the longest; a mask only where one is padded."""
        texts = [row.embedding["tokens"] for row in rows]
        lengths = [text.shape[1] for text in texts]
        multiple = _TEXT_MULTIPLE_ON_CUDA if self.device.type == "cuda" else 1
        longest = -(-max(lengths) // multiple) * multiple
        tokens = torch.cat([pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])
        if min(lengths) == longest:
            return {"tokens": tokens}
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        return {"tokens": tokens, "mask": mask.to(self.device, non_blocking=True)}


def _with_norm_of(conditional: Tensor, combined: Tensor, states: Sequence[DenoisingState]) -> Tensor:
    """Gives each patch of guided predictions, (B, C, H, W), the norm of the conditional one."""
    members = [k for k, state in enumerate(states) if state.rows == 2]
    if not members:
        return combined
    wanted, given = (pack(each).norm(dim=-1, keepdim=True) for each in (conditional[members], combined[members]))
    scaled = combined.clone()
    scaled[members] = unpack(pack(combined[members]) * (wanted / given), *combined.shape[2:])
    return scaled

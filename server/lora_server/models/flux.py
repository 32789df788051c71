"""The family of FLUX.1, dev and schnell: two text encoders, a transformer with guidance distilled into it.

Equals diffusers' `FluxPipeline` (the oracle of tests/parity). The guidance scale of dev is an input of the network and
costs nothing; schnell has none. True guidance with a negative prompt is there for who asks for it by `true_cfg_scale`:
then an image takes two rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_server.models.base import Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.flow_family import PATCH, FlowFamily, of_rows, pack, unpack
from lora_server.models.flux_attention import FluxAttention
from lora_server.models.guidance import guidance_rows, guided
from lora_server.models.prompt_length import TextLimit
from lora_server.models.schedules import advance, model_latents
from lora_server.models.settings import FamilyDefaults, ModelSettings
from lora_server.types import GenerationParameters, GuidanceKind

_DEV = FamilyDefaults(side_px=1024, num_inference_steps=28, guidance_scale=3.5, max_sequence_length=512)
_SCHNELL = FamilyDefaults(side_px=1024, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256)


class Flux(FlowFamily):
    """A loaded FLUX.1 pipeline as a `ModelFamily`."""

    family = "flux"
    pipeline_class = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a `FluxPipeline`, already on its device and in its type; owns it from now on."""
        super().__init__(pipeline, name, settings)
        for block in self.blocks:
            block.get_submodule("attn").set_processor(FluxAttention())  # type: ignore[operator]

    @property
    def published(self) -> FamilyDefaults:
        """Dev's or schnell's."""
        return _DEV if self._transformer.config.guidance_embeds else _SCHNELL

    @property
    def guidance(self) -> GuidanceKind:
        """Dev's is distilled; schnell has none."""
        return GuidanceKind.DISTILLED if self._transformer.config.guidance_embeds else GuidanceKind.NONE

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The blocks of two streams, then those of one."""
        return [*self._transformer.transformer_blocks, *self._transformer.single_transformer_blocks]

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; what else the blocks multiply tokens with; everything."""
        attention = frozenset(path for path in paths if ".attn." in path)
        others = frozenset(path for path in paths if ".ff" in path or ".proj_mlp" in path or _is_single_out(path))
        return attention, attention | others, frozenset(paths)

    def guides(self, parameters: GenerationParameters) -> bool:
        """Only over a true guidance scale of 1."""
        return parameters.true_cfg_scale > 1

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch: T5 gives the tokens, CLIP the pooled vector."""
        tokens, pooled, _ = self._pipeline.encode_prompt(
            prompt=[prompt.text for prompt in prompts],
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return [
            PromptEmbedding({"tokens": tokens[k : k + 1], "pooled": pooled[k : k + 1]}) for k in range(len(prompts))
        ]

    def text_limits(self) -> Sequence[TextLimit]:
        """CLIP's is its own, T5's the model's or the folder's."""
        return [
            TextLimit("text_encoder", self._pipeline.tokenizer, self._pipeline.tokenizer_max_length),
            TextLimit("text_encoder_2", self._pipeline.tokenizer_2, self.max_sequence_length),
        ]

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step."""
        latents, rows = model_latents(states), guidance_rows(states)
        owners = [states[row.index] for row in rows]
        timesteps = torch.stack([owner.timestep for owner in owners]).to(self.device, non_blocking=True)
        inputs = {
            "latents": of_rows(latents, rows).to(self.dtype),
            "timestep": timesteps.to(self.dtype) / 1000,
            "tokens": torch.cat([row.embedding["tokens"] for row in rows]),
            "pooled": torch.cat([row.embedding["pooled"] for row in rows]),
        }
        if self._transformer.config.guidance_embeds:
            scales = torch.tensor([owner.parameters.guidance_scale for owner in owners])
            inputs["guidance"] = scales.to(self.device, non_blocking=True)
        velocity = denoise(owners, inputs, {}).to(latents.dtype)
        advance(states, guided(states, velocity, [state.parameters.true_cfg_scale for state in states]))

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Packs the latents, runs the transformer, and unpacks its prediction."""
        latents, tokens = inputs["latents"], inputs["tokens"]
        height, width = latents.shape[2:]
        velocity = self._transformer(
            hidden_states=pack(latents),
            timestep=inputs["timestep"],
            guidance=inputs.get("guidance"),
            encoder_hidden_states=tokens,
            pooled_projections=inputs["pooled"],
            txt_ids=torch.zeros((tokens.shape[1], 3), device=tokens.device),
            img_ids=_positions(height // PATCH, width // PATCH, latents.device),
            return_dict=False,
            **options,
        )[0]
        return unpack(velocity, height, width)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each patch, (height * width, 3); the first coordinate is for other uses of the model."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.nn.functional.pad(grid, (1, 0))


def _is_single_out(path: str) -> bool:
    return path.startswith("single_transformer_blocks.") and path.endswith(".proj_out")

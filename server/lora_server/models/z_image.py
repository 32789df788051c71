"""The family of Z-Image, base and Turbo: a language model for the text, one stream of image and text tokens.

Equals diffusers' `ZImagePipeline` (the oracle of tests/parity), with its conventions: guidance acts at every scale over
0, as positive + scale * (positive - negative), so 0 is off and 1 already guides; latents are float32 in every type.

diffusers' transformer takes lists and builds its masks from their lengths. `forward` is the same network on tensors, so
that rows with texts of different lengths step together and graphs can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_server.models.base import Conditioning, Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.flow_family import PATCH, FlowFamily, of_rows
from lora_server.models.guidance import Row
from lora_server.models.prompt_length import TextLimit
from lora_server.models.schedules import advance, model_latents
from lora_server.models.settings import FamilyDefaults
from lora_server.types import GenerationParameters

_BASE = FamilyDefaults(side_px=1024, num_inference_steps=50, guidance_scale=5.0, max_sequence_length=512)
_TURBO = FamilyDefaults(side_px=1024, num_inference_steps=9, guidance_scale=0.0, max_sequence_length=512)
_MARK = "PLACE-OF-THE-PROMPT"
_SEQUENCE_MULTIPLE = 32
"""Image and text tokens are padded to multiples of this, each kind with a learned token."""


class ZImage(FlowFamily):
    """A loaded Z-Image pipeline as a `ModelFamily`."""

    family = "z-image"
    pipeline_class = "ZImagePipeline"
    text_encoders = ("text_encoder",)
    guidance_threshold = 0.0

    @property
    def published(self) -> FamilyDefaults:
        """The base model's or Turbo's, which only its name tells: the files have the same configuration."""
        return _TURBO if "turbo" in self._name.lower() else _BASE

    @property
    def max_side_px(self) -> int:
        """The longest side whose patches have positions in the network's tables."""
        return int(min(self._transformer.axes_lens[1:])) * PATCH * int(self._pipeline.vae_scale_factor)

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of a text: no more than leave the image behind it a position in the network's tables."""
        positions = int(self._transformer.axes_lens[0]) - 2
        return min(super().max_sequence_length, positions // _SEQUENCE_MULTIPLE * _SEQUENCE_MULTIPLE)

    @property
    def latent_channels(self) -> int:
        """C, channels of the latents."""
        return int(self._transformer.in_channels)

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The refiners of image and text, then the blocks of both."""
        network = self._transformer
        return [*network.noise_refiner, *network.context_refiner, *network.layers]

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; attention and feed-forward; everything."""
        attention = frozenset(path for path in paths if ".attention." in path)
        feed_forward = frozenset(path for path in paths if ".feed_forward." in path)
        return attention, attention | feed_forward, frozenset(paths)

    def guides(self, parameters: GenerationParameters) -> bool:
        """Over a guidance scale of 0."""
        return parameters.guidance_scale > self.guidance_threshold

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch; each keeps as many tokens as it has."""
        embeddings, _ = self._pipeline.encode_prompt(
            prompt=[prompt.text for prompt in prompts],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [PromptEmbedding({"tokens": each[None]}, batch_shape="padded") for each in embeddings]

    def text_limits(self) -> Sequence[TextLimit]:
        """The chat around the prompt counts."""
        return [TextLimit("text_encoder", self._pipeline.tokenizer, self.max_sequence_length, wrap=self._chat)]

    def _chat(self, prompt: str) -> tuple[str, int]:
        """The prompt as the pipeline puts it to the language model, and where it begins there."""

        def said(content: str) -> str:
            text = self._pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            assert isinstance(text, str)
            return text

        return said(prompt), said(_MARK).index(_MARK)

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        states = super().begin(parameters, conditioning)
        for state in states:
            state.latents = state.latents.to(torch.float32)
        return states

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step."""
        latents = model_latents(states)
        guided = [k for k, state in enumerate(states) if self._is_guided(state)]
        rows = [Row(k, state.conditioning.positive) for k, state in enumerate(states)]
        for k in guided:
            negative = states[k].conditioning.negative
            assert negative is not None
            rows.append(Row(k, negative))
        owners = [states[row.index] for row in rows]
        timesteps = torch.stack([(1000 - owner.timestep) / 1000 for owner in owners])
        inputs = {
            "latents": of_rows(latents, rows).to(self.dtype),
            "timestep": timesteps.to(self.device, non_blocking=True),
            **self._texts([row.embedding["tokens"] for row in rows]),
        }
        predictions = denoise(owners, inputs, {}).to(torch.float32)
        combined = predictions[: len(states)].clone()
        for k, negative in zip(guided, predictions[len(states) :], strict=True):
            combined[k] = self._combine(combined[k], negative, states[k].parameters.guidance_scale)
        advance(states, -combined)

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:  # noqa: ARG002 - it has none
        """Runs the transformer on B images, (B, C, H, W), and texts that are padded to one length, (B, T, C)."""
        network = self._transformer
        latents, used = inputs["latents"], inputs.get("used")
        height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        timestep = network.t_embedder(inputs["timestep"] * network.t_scale).type_as(latents)
        text = network.cap_embedder(inputs["tokens"])
        text = torch.where(inputs["real"][..., None], text, network.cap_pad_token)
        text_length = text.shape[1]
        lengths = used.sum(dim=1) if used is not None else inputs["timestep"].new_full((len(text),), text_length).long()
        image = network.all_x_embedder[f"{PATCH}-1"](_patches(latents))
        padding = -image.shape[1] % _SEQUENCE_MULTIPLE
        image = torch.cat([image, network.x_pad_token.expand(len(image), padding, -1).to(image.dtype)], dim=1)
        image_places, text_places = self._places(lengths, (height, width), padding, text_length)
        for block in network.noise_refiner:
            image = block(image, None, image_places, timestep)
        for block in network.context_refiner:
            text = block(text, used, text_places)
        both, places = torch.cat([image, text], dim=1), torch.cat([image_places, text_places], dim=1)
        mask = None if used is None else pad(used, (image.shape[1], 0), value=True)
        for block in network.layers:
            both = block(both, mask, places, timestep)
        both = network.all_final_layer[f"{PATCH}-1"](both, c=timestep)
        return _image(both[:, : height * width], height, width)

    def _places(self, lengths: Tensor, size: tuple[int, int], padding: int, text_length: int) -> tuple[Tensor, Tensor]:
        """The rotary factors of image tokens and of text tokens, (B, tokens, ...).

        A text's tokens lie at 1, 2, ... on the first axis, its image behind them, spread over the other two.
        """
        rows, device = len(lengths), lengths.device
        grid = torch.cartesian_prod(*(torch.arange(side, device=device) for side in size))
        behind = (lengths + 1)[:, None, None].expand(-1, len(grid), 1)
        image = pad(torch.cat([behind, grid.expand(rows, -1, -1)], dim=2), (0, 0, 0, padding))
        text = pad(torch.arange(1, text_length + 1, device=device)[:, None], (0, 2)).expand(rows, -1, -1)
        embed = self._transformer.rope_embedder
        image_factors, text_factors = embed(image.reshape(-1, 3)), embed(text.reshape(-1, 3))
        return image_factors.view(rows, -1, image_factors.shape[-1]), text_factors.view(
            rows, -1, text_factors.shape[-1]
        )

    def _is_guided(self, state: DenoisingState) -> bool:
        """Whether guidance acts at the state's step; cfg_truncation ends it, as in diffusers."""
        done = float((1000 - state.timestep.float()) / 1000)
        return state.rows == 2 and (self._settings.cfg_truncation > 1 or done <= self._settings.cfg_truncation)

    def _combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Guides one prediction, (C, H, W); cfg_normalization bounds its norm, as a multiple of the positive one's."""
        combined = positive + scale * (positive - negative)
        limit = self._settings.cfg_normalization
        if not limit:
            return combined
        most, norm = torch.linalg.vector_norm(positive) * limit, torch.linalg.vector_norm(combined)
        return torch.where(norm > most, combined * (most / norm), combined)

    def _texts(self, texts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The texts, each padded to a multiple with tokens that count, and to the longest with some that do not.

        tokens: (B, T, C); real: (B, T), what is text; used: (B, T), what counts, absent if all of it does.
        """
        lengths = [text.shape[1] for text in texts]
        padded = [-(-length // _SEQUENCE_MULTIPLE) * _SEQUENCE_MULTIPLE for length in lengths]
        longest, place = max(padded), torch.arange(max(padded))[None]
        masks = {"real": place < torch.tensor(lengths)[:, None]}
        if min(padded) < longest:
            masks["used"] = place < torch.tensor(padded)[:, None]
        tokens = torch.cat([pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])
        return {"tokens": tokens, **{name: mask.to(self.device, non_blocking=True) for name, mask in masks.items()}}


def _patches(latents: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, 4C), channels last, unlike other families."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * PATCH**2)


def _image(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_patches`, for *height* by *width* patches."""
    split = patches.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (height, width))
    latents: Tensor = split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height * PATCH, width * PATCH)
    return latents

"""The family of Stable Diffusion 3 and 3.5: MMDiT, three text encoders, rectified flow.

Equals diffusers' `StableDiffusion3Pipeline` (the oracle of tests/parity), with the loop turned inside out: one call
is one step of a batch whose rows may stand at different timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from lora_server.models.autoencoder import lay_out_autoencoder
from lora_server.models.base import Conditioning, Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.fused_gelu import fuse_gelus
from lora_server.models.guidance import Row, guidance_rows, guided, positive
from lora_server.models.prompt_length import TextLimit, truncations
from lora_server.models.schedulers import check_scheduler
from lora_server.models.schedules import Start, advance, begin_states, model_latents
from lora_server.models.sd3_attention import JointAttention
from lora_server.models.settings import FamilyDefaults, ModelSettings
from lora_server.types import GenerationParameters, ModelInfo, PromptTruncation

_T5_TOKENS = 256  # the pipeline's own
_COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")


class StableDiffusion3:
    """A loaded SD3 or SD3.5 pipeline as a `ModelFamily`."""

    denoiser = "transformer"

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a `StableDiffusion3Pipeline`, already on its device and in its type; owns it from now on."""
        check_scheduler(pipeline.scheduler)
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._settings = settings
        self._name = name
        lay_out_autoencoder(pipeline.vae)
        self._vae_dtype = pipeline.vae.dtype
        fuse_gelus(self._transformer)
        for block in self._transformer.transformer_blocks:
            for attention in (block.attn, block.attn2):
                if attention is not None:
                    attention.set_processor(JointAttention())

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
        """The transformer and those text encoders that the folder has (T5 is optional)."""
        return {name: module for name in _COMPONENTS if (module := getattr(self._pipeline, name)) is not None}

    @property
    def info(self) -> ModelInfo:
        """What the server says of the model."""
        config = self._transformer.config
        patch_px = config.patch_size * self._pipeline.vae_scale_factor
        return ModelInfo(
            name=self._name,
            family="sd3",
            pipeline_class=type(self._pipeline).__name__,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            defaults=self._settings.defaults(
                FamilyDefaults(
                    side_px=config.sample_size * self._pipeline.vae_scale_factor,
                    num_inference_steps=50,
                    guidance_scale=7.0,
                )
            ),
            size_multiple_px=patch_px,
            max_side_px=config.pos_embed_max_size * patch_px,
            adaptable_components=tuple(sorted(self.components)),
            num_skippable_layers=config.num_layers,
        )

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The transformer blocks."""
        return list(self._transformer.transformer_blocks)

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder of the autoencoder."""
        decoder: torch.nn.Module = self._pipeline.vae.decoder
        return decoder

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; attention and feed-forward; everything."""
        blocks = [path for path in paths if path.startswith("transformer_blocks.")]
        attention = frozenset(path for path in blocks if ".attn" in path)
        feed_forward = frozenset(path for path in blocks if ".ff" in path)
        return attention, attention | feed_forward, frozenset(paths)

    def guides(self, parameters: GenerationParameters) -> bool:
        """Over a guidance scale of 1."""
        return parameters.uses_guidance

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch, with the text encoders as they are now; negative ones no differently."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=[prompt.text for prompt in prompts],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self._t5_tokens,
        )
        return [
            PromptEmbedding({"tokens": tokens[k : k + 1], "pooled": pooled[k : k + 1]}) for k in range(len(prompts))
        ]

    def truncations(self, prompt: Prompt) -> Sequence[PromptTruncation]:
        """Returns what the tokenizers cut off: CLIP's both at one length, T5's at another."""
        clip, pipeline = self._pipeline.tokenizer_max_length, self._pipeline
        limits = [
            TextLimit("text_encoder", pipeline.tokenizer, clip),
            TextLimit("text_encoder_2", pipeline.tokenizer_2, clip),
        ]
        if pipeline.text_encoder_3 is not None:
            limits.append(TextLimit("text_encoder_3", pipeline.tokenizer_3, self._t5_tokens))
        return truncations(limits, prompt)

    @property
    def _t5_tokens(self) -> int:
        return self._settings.max_sequence_length or _T5_TOKENS

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        shape = (1, self._transformer.config.in_channels, *self._latent_size(parameters))
        shift = self._shift(parameters)
        return begin_states(self, parameters, conditioning, Start(self._pipeline.scheduler, shape, shift))

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step: predicts, guides, and follows the schedule."""
        latents = model_latents(states)
        predictions = self._predict(states, latents, guidance_rows(states), denoise)
        velocity = guided(states, predictions)
        skipping = self._predict_skipping(states, latents, denoise)
        if skipping:
            velocity, conditional = velocity.clone(), positive(states, predictions)
            for k, weakened in skipping.items():
                guidance = states[k].parameters.skip_layer_guidance
                assert guidance is not None
                velocity[k] += (conditional[k] - weakened) * guidance.scale
        advance(states, velocity)

    def forward(self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
        """Runs the transformer; it takes flat tensors as they are."""
        velocity: torch.Tensor = self._transformer(**inputs, **options, return_dict=False)[0]
        return velocity

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents, (B, C, H, W), to images as the autoencoder gives them, (B, 3, height_px, width_px)."""
        vae = self._pipeline.vae
        unscaled = latents.to(self._vae_dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image: torch.Tensor = vae.decode(unscaled, return_dict=False)[0]
        return image

    def _shift(self, parameters: GenerationParameters) -> dict[str, float]:
        """What the scheduler has to know of the image's size."""
        config = self._pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        height, width = self._latent_size(parameters)
        patch = self._transformer.config.patch_size
        bounds = (config[n] for n in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
        return {"mu": calculate_shift((height // patch) * (width // patch), *bounds)}

    def _latent_size(self, parameters: GenerationParameters) -> tuple[int, int]:
        factor = self._pipeline.vae_scale_factor
        return parameters.height_px // factor, parameters.width_px // factor

    def _predict(
        self,
        states: Sequence[DenoisingState],
        latents: torch.Tensor,
        rows: Sequence[Row],
        denoise: Denoise,
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """Returns the velocity of each row, (rows, C, H, W), at least float32."""
        owners = [states[row.index] for row in rows]
        # Not `latents.dtype`: between steps the latents keep more digits than half types have.
        inputs = {
            "hidden_states": torch.cat([latents[row.index : row.index + 1] for row in rows]).to(self.dtype),
            "timestep": torch.stack([owner.timestep for owner in owners]).to(self.device, non_blocking=True),
            "encoder_hidden_states": torch.cat([row.embedding["tokens"] for row in rows]),
            "pooled_projections": torch.cat([row.embedding["pooled"] for row in rows]),
        }
        output = denoise(owners, inputs, {"skip_layers": list(skip_layers)} if skip_layers else {})
        return output.to(latents.dtype)

    def _predict_skipping(
        self, states: Sequence[DenoisingState], latents: torch.Tensor, denoise: Denoise
    ) -> dict[int, torch.Tensor]:
        """Returns, by index, the conditional predictions without the layers that the states' requests skip."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for k, state in enumerate(states):
            guidance = state.parameters.skip_layer_guidance
            if guidance is not None and _skips_layers(state):
                groups.setdefault(guidance.layers, []).append(k)
        found: dict[int, torch.Tensor] = {}
        for layers, members in groups.items():
            rows = [Row(k, states[k].conditioning.positive) for k in members]
            found.update(zip(members, self._predict(states, latents, rows, denoise, layers), strict=True))
        return found


def _skips_layers(state: DenoisingState) -> bool:
    """Whether skip-layer guidance acts at the state's step: strictly between start and stop, as in diffusers."""
    guidance = state.parameters.skip_layer_guidance
    if guidance is None or not state.parameters.uses_guidance:
        return False
    steps = state.parameters.num_inference_steps
    return steps * guidance.start < state.step_index < steps * guidance.stop

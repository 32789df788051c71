"""The family of Stable Diffusion 3 and 3.5: MMDiT, three text encoders, rectified flow.

Equals diffusers' `StableDiffusion3Pipeline` (the oracle of tests/parity), with the loop turned inside out: one call
is one step of a batch whose rows may stand at different timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_server.models.base import (
    Conditioning,
    Denoise,
    DenoisingState,
    Prompt,
    PromptEmbedding,
    StepSchedule,
)
from lora_server.models.fused_gelu import fuse_gelus
from lora_server.models.sd3_attention import JointAttention
from lora_server.models.settings import ModelSettings
from lora_server.types import GenerationParameters, ModelInfo

PIPELINE_CLASS = "StableDiffusion3Pipeline"
_COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")


class StableDiffusion3:
    """A loaded SD3 or SD3.5 pipeline as a `ModelFamily`."""

    denoiser = "transformer"

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a `StableDiffusion3Pipeline`, already on its device and in its type; owns it from now on."""
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._settings = settings
        self._name = name
        pipeline.vae.to(memory_format=torch.channels_last)  # a third faster, on the CPU and on CUDA
        fuse_gelus(self._transformer)
        for block in self._transformer.transformer_blocks:
            for attention in (block.attn, block.attn2):
                if attention is not None:
                    attention.set_processor(JointAttention())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self._transformer.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the arithmetic."""
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
            pipeline_class=PIPELINE_CLASS,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            defaults=self._settings.defaults(native_side_px=config.sample_size * self._pipeline.vae_scale_factor),
            size_multiple_px=patch_px,
            max_side_px=config.pos_embed_max_size * patch_px,
            adaptable_components=tuple(sorted(self.components)),
            num_skippable_layers=config.num_layers,
        )

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The transformer blocks."""
        return list(self._transformer.transformer_blocks)

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Attention; attention and feed-forward; everything."""
        blocks = [path for path in paths if path.startswith("transformer_blocks.")]
        attention = frozenset(path for path in blocks if ".attn" in path)
        feed_forward = frozenset(path for path in blocks if ".ff" in path)
        return attention, attention | feed_forward, frozenset(paths)

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes prompts, in one batch, with the text encoders as they are now; negative ones no differently."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=[prompt.text for prompt in prompts],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self._settings.max_sequence_length,
        )
        return [PromptEmbedding(tokens[k : k + 1], pooled[k : k + 1]) for k in range(len(prompts))]

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        schedule = self._schedule(parameters)
        rows = 2 if parameters.uses_guidance else 1
        return [
            DenoisingState(parameters, k, conditioning, schedule, self._initial_latents(parameters, seed), rows)
            for k, seed in enumerate(parameters.seeds)
        ]

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:
        """Advances every state by one step: predicts the velocity, guides it, and follows it (Euler)."""
        latents = torch.cat([state.latents for state in states])
        levels = _Levels.of(states, latents)
        guided = [k for k, state in enumerate(states) if state.parameters.uses_guidance]
        rows = [(k, _negative(states[k])) for k in guided]
        rows += [(k, state.conditioning.positive) for k, state in enumerate(states)]
        predictions = self._predict(states, latents, rows, denoise)
        conditional = predictions[len(guided) :]
        velocity = conditional
        if len(guided) == len(states):
            negative = predictions[: len(guided)]
            velocity = negative + levels.guidance * (conditional - negative)
        elif guided:
            negative, velocity = predictions[: len(guided)], conditional.clone()
            velocity[guided] = negative + levels.guidance[guided] * (conditional[guided] - negative)
        for k, weakened in self._predict_skipping(states, latents, denoise).items():
            guidance = states[k].parameters.skip_layer_guidance
            assert guidance is not None
            velocity[k] += (conditional[k] - weakened) * guidance.scale
        _follow(states, latents, velocity, levels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents, (B, C, H, W), to pixels on the device, (B, height_px, width_px, 3) uint8."""
        vae = self._pipeline.vae
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(unscaled, return_dict=False)[0]
        pixels = (image / 2 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        permuted: torch.Tensor = pixels.permute(0, 2, 3, 1).contiguous()
        return permuted

    def _schedule(self, parameters: GenerationParameters) -> StepSchedule:
        # A scheduler of one's own for each request: its timesteps are mutable state.
        scheduler = type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config)
        options: dict[str, float] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            height, width = self._latent_size(parameters)
            patch = self._transformer.config.patch_size
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            bounds = (scheduler.config[name] for name in names)
            options["mu"] = calculate_shift((height // patch) * (width // patch), *bounds)
        scheduler.set_timesteps(parameters.num_inference_steps, device="cpu", **options)
        return StepSchedule(scheduler.timesteps, scheduler.sigmas)

    def _latent_size(self, parameters: GenerationParameters) -> tuple[int, int]:
        factor = self._pipeline.vae_scale_factor
        return parameters.height_px // factor, parameters.width_px // factor

    def _initial_latents(self, parameters: GenerationParameters, seed: int) -> torch.Tensor:
        shape = (1, self._transformer.config.in_channels, *self._latent_size(parameters))
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return noise.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _predict(
        self,
        states: Sequence[DenoisingState],
        latents: torch.Tensor,
        rows: Sequence[tuple[int, PromptEmbedding]],
        denoise: Denoise,
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """Returns the velocity of each row (its state's index, its prompt), (B, C, H, W), at least float32."""
        owners = [states[k] for k, _ in rows]
        timesteps = torch.stack([state.schedule.timesteps[state.step_index] for state in owners])
        # Not `latents.dtype`: between steps the latents keep more digits than half types have.
        inputs = {
            "hidden_states": torch.cat([latents[k : k + 1] for k, _ in rows]).to(self.dtype),
            "timestep": timesteps.to(self.device, non_blocking=True),
            "encoder_hidden_states": torch.cat([embedding.tokens for _, embedding in rows]),
            "pooled_projections": torch.cat([embedding.pooled for _, embedding in rows]),
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
            rows = [(k, states[k].conditioning.positive) for k in members]
            found.update(zip(members, self._predict(states, latents, rows, denoise, layers), strict=True))
        return found


@dataclass(frozen=True, slots=True)
class _Levels:
    """Per state, each (B, 1, 1, 1): the noise level now, its change in this step, and the guidance scale."""

    sigma: torch.Tensor
    change: torch.Tensor
    guidance: torch.Tensor

    @staticmethod
    def of(states: Sequence[DenoisingState], like: torch.Tensor) -> _Levels:
        sigma = torch.stack([state.schedule.sigmas[state.step_index] for state in states])
        following = torch.stack([state.schedule.sigmas[state.step_index + 1] for state in states])
        guidance = torch.tensor([state.parameters.guidance_scale for state in states], dtype=like.dtype)
        values = torch.stack([sigma.to(like.dtype), (following - sigma).to(like.dtype), guidance])
        return _Levels(*values.to(like.device, non_blocking=True)[:, :, None, None, None])


def _negative(state: DenoisingState) -> PromptEmbedding:
    assert state.conditioning.negative is not None
    return state.conditioning.negative


def _skips_layers(state: DenoisingState) -> bool:
    """Whether skip-layer guidance acts at the state's step: strictly between start and stop, as in diffusers."""
    guidance = state.parameters.skip_layer_guidance
    if guidance is None or not state.parameters.uses_guidance:
        return False
    steps = state.parameters.num_inference_steps
    return steps * guidance.start < state.step_index < steps * guidance.stop


def _follow(states: Sequence[DenoisingState], latents: torch.Tensor, velocity: torch.Tensor, levels: _Levels) -> None:
    """Takes one Euler step of the probability-flow ODE, dx = v dsigma; mutates the states.

    Rounds the sample to float32 first, as diffusers' FlowMatchEulerDiscreteScheduler does in every type.
    """
    sample = latents.to(torch.float32)
    following = (sample + levels.change * velocity).to(latents.dtype)
    denoised = sample - levels.sigma * velocity
    for k, state in enumerate(states):
        state.latents, state.denoised = following[k : k + 1], denoised[k : k + 1]
        state.step_index += 1

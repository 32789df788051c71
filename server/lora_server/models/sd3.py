"""The family of Stable Diffusion 3 and 3.5: MMDiT, three text encoders, rectified flow.

Equals diffusers' `StableDiffusion3Pipeline` (the oracle of tests/parity), with the loop turned inside out: one call
is one step of a batch whose rows may stand at different timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_server.models.base import Conditioning, DenoisingState, PromptEmbedding, StepSchedule
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

    def encode(self, parameters: GenerationParameters) -> Conditioning:
        """Encodes the prompts of a request with the text encoders as they are now."""
        tokens, negative_tokens, pooled, negative_pooled = self._pipeline.encode_prompt(
            prompt=parameters.prompt,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=parameters.negative_prompt,
            do_classifier_free_guidance=parameters.uses_guidance,
            device=self.device,
            max_sequence_length=self._settings.max_sequence_length,
        )
        negative = PromptEmbedding(negative_tokens, negative_pooled) if parameters.uses_guidance else None
        return Conditioning(PromptEmbedding(tokens, pooled), negative)

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images at pure noise; image k draws it from the CPU with seed + k."""
        schedule = self._schedule(parameters)
        return [
            DenoisingState(parameters, k, conditioning, schedule, self._initial_latents(parameters, seed))
            for k, seed in enumerate(parameters.seeds)
        ]

    def step(self, states: Sequence[DenoisingState]) -> None:
        """Advances every state by one step: predicts the velocity, guides it, and follows it (Euler)."""
        guided = [state for state in states if state.parameters.uses_guidance]
        skipping = [state for state in guided if _skips_layers(state)]
        rows = [(state, _negative(state)) for state in guided]
        rows += [(state, state.conditioning.positive) for state in states]
        predictions = self._predict(rows)
        conditional = dict(zip(map(id, states), predictions[len(guided) :], strict=True))
        velocity = dict(conditional)
        for state, negative in zip(guided, predictions[: len(guided)], strict=True):
            difference = conditional[id(state)] - negative
            velocity[id(state)] = negative + state.parameters.guidance_scale * difference
        for state, weakened in zip(skipping, self._predict_skipping(skipping), strict=True):
            guidance = state.parameters.skip_layer_guidance
            assert guidance is not None
            velocity[id(state)] += (conditional[id(state)] - weakened) * guidance.scale
        for state in states:
            _follow(state, velocity[id(state)])

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Decodes latents of one image, (1, C, H, W), to pixels, (height_px, width_px, 3)."""
        vae = self._pipeline.vae
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(unscaled, return_dict=False)[0]
        pixels = (image / 2 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        array: NDArray[np.uint8] = pixels[0].permute(1, 2, 0).contiguous().cpu().numpy()
        return array

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
        self, rows: Sequence[tuple[DenoisingState, PromptEmbedding]], skip_layers: tuple[int, ...] = ()
    ) -> Sequence[torch.Tensor]:
        """Returns the velocity of each row, (1, C, H, W), at least float32; one forward pass for all."""
        # Not `latents.dtype`: between steps the latents keep more digits than half types have.
        output = self._transformer(
            hidden_states=torch.cat([state.latents for state, _ in rows]).to(self.dtype),
            timestep=torch.stack([state.schedule.timesteps[state.step_index] for state, _ in rows]).to(self.device),
            encoder_hidden_states=torch.cat([embedding.tokens for _, embedding in rows]),
            pooled_projections=torch.cat([embedding.pooled for _, embedding in rows]),
            skip_layers=list(skip_layers) or None,
            return_dict=False,
        )[0]
        velocities: Sequence[torch.Tensor] = output.to(rows[0][0].latents.dtype).split(1)
        return velocities

    def _predict_skipping(self, states: Sequence[DenoisingState]) -> list[torch.Tensor]:
        """Returns each state's conditional prediction without the layers that its request skips."""
        found: dict[int, torch.Tensor] = {}
        groups: dict[tuple[int, ...], list[DenoisingState]] = {}
        for state in states:
            guidance = state.parameters.skip_layer_guidance
            assert guidance is not None
            groups.setdefault(guidance.layers, []).append(state)
        for layers, members in groups.items():
            rows = [(state, state.conditioning.positive) for state in members]
            found.update(zip(map(id, members), self._predict(rows, layers), strict=True))
        return [found[id(state)] for state in states]


def _negative(state: DenoisingState) -> PromptEmbedding:
    assert state.conditioning.negative is not None
    return state.conditioning.negative


def _skips_layers(state: DenoisingState) -> bool:
    """Whether skip-layer guidance acts at the state's step: strictly between start and stop, as in diffusers."""
    guidance = state.parameters.skip_layer_guidance
    if guidance is None:
        return False
    steps = state.parameters.num_inference_steps
    return steps * guidance.start < state.step_index < steps * guidance.stop


def _follow(state: DenoisingState, velocity: torch.Tensor) -> None:
    """Takes one Euler step of the probability-flow ODE, dx = v dsigma; mutates *state*.

    Rounds the sample to float32 first, as diffusers' FlowMatchEulerDiscreteScheduler does in every type.
    """
    sigma, next_sigma = state.schedule.sigmas[state.step_index : state.step_index + 2]
    sample = state.latents.to(torch.float32)
    state.latents = (sample + (next_sigma - sigma) * velocity).to(state.latents.dtype)
    state.denoised = sample - sigma * velocity
    state.step_index += 1

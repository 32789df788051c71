"""How images pass through the noise levels: the flow of rectified models, vectorised, and any scheduler of diffusers.

A batch may hold images with different schedules and at different steps. Nothing here is shared between images, and
nothing is half done: `advance` changes all states or, if it raises, none.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_server.errors import FieldFault, InvalidRequestError
from lora_server.models.base import Conditioning, DenoisingState, ModelFamily, StepSchedule
from lora_server.types import GenerationParameters

_SAMPLE_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """Euler steps along a rectified flow, dx = v dsigma; without state, so that images share it.

    Attributes:
        timesteps: (N,) float32 on the CPU, what the denoiser is told at each of N steps.
        sigmas: (N + 1,) float32 on the CPU, noise level before each step, and after the last.
    """

    timesteps: Tensor
    sigmas: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """A scheduler of diffusers that one image owns, with its history and the source of its noise; never shared.

    Attributes:
        scheduler: Stands before the image's next step.
        generator: The image's own, on the CPU; what it drew first was the initial noise.
    """

    scheduler: Any
    generator: torch.Generator

    @property
    def timesteps(self) -> Tensor:
        """(N,) on the CPU, what the denoiser is told at each of N steps."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """Returns the latents, (1, C, H, W), as the denoiser is to see them."""
        scaled: Tensor = self.scheduler.scale_model_input(latents, self.timesteps[step_index])
        return scaled

    def step(self, prediction: Tensor, latents: Tensor, step_index: int) -> tuple[Solver, Tensor, Tensor]:
        """Returns the solver, the latents and the estimate of the final ones after the step; changes nothing."""
        following = Solver(_fork(self.scheduler), self.generator.clone_state())
        timestep = self.timesteps[step_index]
        accepts = inspect.signature(following.scheduler.step).parameters
        options = {"generator": following.generator} if "generator" in accepts else {}
        stepped, *rest = following.scheduler.step(prediction, timestep, latents, return_dict=False, **options)
        denoised = rest[0] if rest else _estimate(self.scheduler, prediction, timestep, latents)
        return following, stepped.to(latents.dtype), denoised


@dataclass(frozen=True, slots=True)
class Start:
    """Where the images of a request begin.

    Attributes:
        scheduler: The pipeline's, or another of its kind; it is left as it is.
        shape: (1, C, H, W), of an image's latents.
        options: What the scheduler's `set_timesteps` gets beside the number of steps.
    """

    scheduler: Any
    shape: tuple[int, int, int, int]
    options: Mapping[str, Any] = field(default_factory=dict)


def begin_states(
    family: ModelFamily, parameters: GenerationParameters, conditioning: Conditioning, start: Start
) -> list[DenoisingState]:
    """Returns the states of a request's images at pure noise.

    Image k draws its noise in float32 from its own CPU generator, seeded with seed + k; what its schedule draws later
    comes from the same generator.
    """
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in parameters.seeds]
    dtype = torch.promote_types(family.dtype, torch.float32)
    latents = [torch.randn(start.shape, generator=each, dtype=torch.float32).to(family.device, dtype) for each in noise]
    schedules = _schedules(start, parameters.num_inference_steps, noise)
    rows = 2 if family.guides(parameters) else 1
    return [
        DenoisingState(parameters, k, conditioning, schedule, latent * _initial_scale(schedule), rows)
        for k, (schedule, latent) in enumerate(zip(schedules, latents, strict=True))
    ]


def _schedules(start: Start, num_inference_steps: int, noise: Sequence[torch.Generator]) -> list[StepSchedule]:
    scheduler = type(start.scheduler).from_config(start.scheduler.config)  # set_timesteps changes it
    try:
        with np.errstate(invalid="ignore"):  # told below
            scheduler.set_timesteps(num_inference_steps, device="cpu", **start.options)
    except ValueError as error:  # LCM's, for one, takes no more steps than it was distilled to
        fault = FieldFault("spec.num_inference_steps", f"does not suit the scheduler: {error}")
        raise InvalidRequestError([fault]) from error
    if not bool(scheduler.timesteps.isfinite().all()):  # one step, stretched to a last level as Qwen-Image has it
        raise InvalidRequestError([FieldFault("spec.num_inference_steps", "is too few for the model's scheduler")])
    if is_plain_flow(scheduler):
        return [FlowSchedule(scheduler.timesteps, scheduler.sigmas)] * len(noise)
    return [Solver(_fork(scheduler), generator) for generator in noise]


def _initial_scale(schedule: StepSchedule) -> Any:
    """What the initial noise is multiplied with."""
    return schedule.scheduler.init_noise_sigma if isinstance(schedule, Solver) else 1.0


def is_plain_flow(scheduler: Any) -> bool:
    """Whether the scheduler's step is Euler's along a flow, and nothing else."""
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling


def model_latents(states: Sequence[DenoisingState]) -> Tensor:
    """Returns the latents of all states as the denoiser is to see them, (B, C, H, W), at least float32."""
    return torch.cat(
        [
            state.schedule.scale(state.latents, state.step_index)
            if isinstance(state.schedule, Solver)
            else state.latents
            for state in states
        ]
    )


def advance(states: Sequence[DenoisingState], prediction: Tensor) -> None:
    """Takes one step with *prediction*, (B, C, H, W), in the type of the latents; mutates all states or none."""
    results: list[tuple[StepSchedule, Tensor, Tensor]] = [None] * len(states)  # type: ignore[list-item]
    flowing = [k for k, state in enumerate(states) if isinstance(state.schedule, FlowSchedule)]
    if flowing:
        velocity = prediction if len(flowing) == len(states) else prediction[flowing]
        latents, denoised = _flow([states[k] for k in flowing], velocity)
        for place, k in enumerate(flowing):
            results[k] = states[k].schedule, latents[place : place + 1], denoised[place : place + 1]
    for k, state in enumerate(states):
        if isinstance(state.schedule, Solver):
            results[k] = state.schedule.step(prediction[k : k + 1], state.latents, state.step_index)
    for state, (schedule, following, estimate) in zip(states, results, strict=True):
        state.schedule, state.latents, state.denoised = schedule, following, estimate
        state.step_index += 1


def _flow(states: Sequence[DenoisingState], velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the latents after the step and the estimates of the final ones, both (B, C, H, W).

    Rounds the sample to float32 first, as diffusers' FlowMatchEulerDiscreteScheduler does in every type.
    """
    latents = torch.cat([state.latents for state in states])
    sigma, change = _levels(states, latents)
    sample = latents.to(torch.float32)
    following = (sample + change * velocity).to(latents.dtype)
    return following, sample - sigma * velocity


def _levels(states: Sequence[DenoisingState], like: Tensor) -> Tensor:
    """The noise level of each state now, and its change in this step, (2, B, 1, 1, 1)."""
    pairs = []
    for state in states:
        assert isinstance(state.schedule, FlowSchedule)
        pairs.append(state.schedule.sigmas[state.step_index : state.step_index + 2])
    sigma, following = torch.stack(pairs, dim=1)
    values = torch.stack([sigma.to(like.dtype), (following - sigma).to(like.dtype)])
    return values.to(like.device, non_blocking=True)[:, :, None, None, None]


def _fork(scheduler: Any) -> Any:
    """Copies a scheduler so that a step of one leaves the other as it is.

    Steps change lists in place, and sums of predictions, (1, C, H, W) (PNDM's); all else they replace.
    """
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
        elif isinstance(value, Tensor) and value.ndim == _SAMPLE_DIMENSIONS:
            setattr(twin, name, value.clone())
    return twin


def _estimate(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
    """The final latents by what the model says at *timestep*, for schedulers that do not return it.

    Their samples are sqrt(a) x0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4), or along a flow (1 - sigma) x0 + sigma
    noise.
    """
    config = scheduler.config
    if config.prediction_type == "flow_prediction":
        return latents - float(timestep) / int(config.num_train_timesteps) * prediction
    if config.prediction_type == "sample":
        return prediction
    kept = float(scheduler.alphas_cumprod[timestep.long()])
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    if config.prediction_type == "v_prediction":
        return signal * latents - noise * prediction
    return (latents - noise * prediction) / signal

"""Schedules of images: what one image does, or a batch that fails, never shows in another image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from lora_server.errors import InvalidRequestError
from lora_server.models.base import Conditioning, DenoisingState, ModelFamily, PromptEmbedding
from lora_server.models.schedulers import SCHEDULERS, check_scheduler, choose_scheduler
from lora_server.models.schedules import FlowSchedule, Solver, Start, advance, begin_states
from lora_server.types import GenerationParameters

SHAPE = (1, 4, 6, 5)
OWN = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
FAMILY = cast(
    ModelFamily, SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, guides=lambda parameters: False)
)
CONDITIONING = Conditioning(PromptEmbedding({"tokens": torch.zeros(1, 3, 2)}), None)


def begin(scheduler: Any, seed: int = 3, images: int = 1, steps: int = 6) -> list[DenoisingState]:
    """The images of a request at pure noise."""
    parameters = GenerationParameters("", "", 48, 40, steps, 1.0, seed, images)
    return begin_states(FAMILY, parameters, CONDITIONING, Start(scheduler, SHAPE))


def prediction(states: list[DenoisingState]) -> torch.Tensor:
    """A stand-in for the network: depends on the latents and the step alone."""
    return torch.cat([torch.tanh(state.latents) * (1 + 0.1 * state.step_index) for state in states])


def finish(states: list[DenoisingState]) -> list[torch.Tensor]:
    """Steps all images to their end, in batches of those that are left."""
    while left := [state for state in states if not state.finished]:
        advance(left, prediction(left))
    return [state.latents for state in states]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_batch_that_fails_leaves_every_image_as_it_was(name: str) -> None:
    """After a failed step at any point, the images end where they would have ended without it."""
    scheduler = choose_scheduler(OWN, name)
    expected = finish(begin(scheduler))[0]
    state = begin(scheduler)[0]
    broken = begin(scheduler, seed=9)[0]
    while not state.finished:
        broken.schedule = Solver(SimpleNamespace(timesteps=None), torch.Generator())
        before = state.latents
        with pytest.raises((TypeError, AttributeError)):
            advance([state, broken], prediction([state, broken]))
        assert state.latents is before
        advance([state], prediction([state]))
    assert torch.equal(state.latents, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_of_one_batch_do_not_meet(name: str) -> None:
    """Each of three images, with their own history and noise, ends where it ends alone."""
    scheduler = choose_scheduler(OWN, name)
    together = finish(begin(scheduler, images=3))
    alone = [finish(begin(scheduler, seed=3 + k))[0] for k in range(3)]
    for ours, expected in zip(together, alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_estimates_converge_to_the_picture(name: str) -> None:
    """Previews show the final latents better and better, whether the scheduler tells its estimate or not."""
    (state,) = begin(choose_scheduler(OWN, name), steps=12)
    estimates = []
    while not state.finished:
        advance([state], prediction([state]))
        assert state.denoised is not None
        assert state.denoised.shape == SHAPE
        estimates.append(state.denoised)
    errors = [float((estimate - state.latents).abs().mean()) for estimate in estimates]
    assert errors[-1] < errors[0] / 2


def test_flow_and_other_schedules_step_in_one_batch() -> None:
    """A batch may hold both kinds."""
    flow, other = FlowMatchEulerDiscreteScheduler(), choose_scheduler(OWN, "dpmpp_2m")
    mixed = [*begin(other), *begin(flow, seed=4)]
    assert isinstance(mixed[1].schedule, FlowSchedule)
    together = finish(mixed)
    assert torch.equal(together[0], finish(begin(other))[0])
    assert torch.equal(together[1], finish(begin(flow, seed=4))[0])


def test_a_step_without_a_noise_level_is_refused() -> None:
    """A schedule that is stretched to a last level has none for a single step, and would draw NaN."""
    stretched = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.raises(InvalidRequestError, match=r"spec\.num_inference_steps: is too few"):
        begin(stretched, steps=1)
    assert begin(stretched, steps=2)


def test_steps_that_a_scheduler_refuses_are_a_fault_of_the_request() -> None:
    """More steps than LCM was distilled to: by field, with the scheduler's reason."""
    with pytest.raises(InvalidRequestError, match=r"spec\.num_inference_steps"):
        begin(choose_scheduler(OWN, "lcm"), steps=60)


def test_an_unknown_scheduler_of_a_model_is_refused() -> None:
    """What is not known to work image by image is not served."""
    check_scheduler(OWN)
    with pytest.raises(ValueError, match=r"'plms'.*euler_ancestral"):
        choose_scheduler(OWN, "plms")
    with pytest.raises(ValueError, match=r"SimpleNamespace.*DDIMScheduler"):
        check_scheduler(SimpleNamespace())

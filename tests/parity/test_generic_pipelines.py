"""What the generic way in makes of different pipelines: callbacks of both kinds, packed latents, schedulers that take
more steps than asked for; and which pipelines it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.models.base import Conditioning, DenoisingState, Prompt
from lora_server.models.generic import GenericPipeline
from lora_server.models.pipeline_call import PipelineCall
from lora_server.models.pixels import to_pixels
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.models.settings import ModelSettings
from lora_server.types import GenerationParameters

from tests.parity import tiny_flow
from tests.parity.harness import assert_same

WANTED = GenerationParameters("a red star", "", 64, 96, 4, 3.5, seed=5, num_images=2)


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def begin(pipeline: Any) -> tuple[GenericPipeline, list[DenoisingState]]:
    family = GenericPipeline(pipeline, "tiny", ModelSettings(max_sequence_length=40))
    (embedding,) = family.encode([Prompt(WANTED.prompt)])
    return family, family.begin(WANTED, Conditioning(embedding, None))


def never(*_: object) -> torch.Tensor:
    raise AssertionError("the pipeline runs its network itself")


@pytest.mark.parametrize("kind", ["flux", "pixart with two evaluations a step"])
def test_images_of_a_request_are_those_of_their_own_calls(kind: str, tmp_path: Path) -> None:
    """Interleaved step by step, each with its scheduler; the last step, and no earlier one, finishes an image."""
    from diffusers import HeunDiscreteScheduler

    def prepared() -> Any:
        pipeline = load(tmp_path)
        if kind != "flux":
            pipeline.scheduler = HeunDiscreteScheduler()
        return pipeline

    options: dict[str, Any] = {"max_sequence_length": 40}
    if kind == "flux":
        tiny_flow.build_flux(tmp_path)
    else:
        tiny_flow.build_pixart(tmp_path)
        options["use_resolution_binning"] = False
    family, states = begin(prepared())
    with torch.inference_mode():
        for step in range(WANTED.num_inference_steps):
            assert not any(state.latents.any() for state in states)
            family.step(states, never)
            assert [state.step_index for state in states] == [step + 1] * 2
            preview = states[0].denoised
            assert preview is not None
            assert family.decode(preview).shape == (1, 3, 96, 64)
        ours = to_pixels(family.decode(torch.cat([state.latents for state in states]))).numpy()
    for seed, image in zip(WANTED.seeds, ours, strict=True):
        own = prepared()(
            WANTED.prompt,
            height=96,
            width=64,
            num_inference_steps=4,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        assert_same(image, np.asarray(own.images[0]), torch.float32)  # two threads add up in another order


def _image_to_image(folder: Path) -> str:
    tiny_flow.build_flux(folder)
    return _renamed(folder, "FluxImg2ImgPipeline")


def _renamed(folder: Path, name: str) -> str:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return str(folder)


def test_a_pipeline_that_starts_from_an_image_is_refused(tmp_path: Path) -> None:
    """With the reason, when the server starts."""
    with pytest.raises(ModelLoadError, match="starts from an image"):
        load_model(ModelConfig(model=_image_to_image(tmp_path), device="cpu"))


def test_a_class_that_diffusers_does_not_have_is_refused(tmp_path: Path) -> None:
    """The list of what works is in the message."""
    tiny_flow.build_pixart(tmp_path)
    with pytest.raises(ModelLoadError, match=r"NoSuchPipeline.*FluxPipeline"):
        load_model(ModelConfig(model=_renamed(tmp_path, "NoSuchPipeline"), device="cpu"))


def test_a_call_hands_over_steps_then_its_result() -> None:
    """`advance` returns at every step; after the end it does nothing."""

    def run(report: Any) -> str:
        report(torch.ones(1))
        report(None)
        return "done"

    call = PipelineCall(run, torch.device("cpu"))
    seen = []
    for _ in range(4):
        call.advance()
        seen.append((call.steps, call.latents is None, call.result))
    assert seen == [(1, False, None), (2, True, None), (2, True, "done"), (2, True, "done")]


def test_what_a_call_raises_is_raised_again() -> None:
    """A call that failed stays failed."""

    def run(_: Any) -> str:
        raise ValueError("broken")

    call = PipelineCall(run, torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            call.advance()

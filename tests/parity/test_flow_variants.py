"""Variants of the flow families, in a few pictures each; the families themselves are in test_families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.types import ApplicationWay, ExecutionPath, GuidanceKind
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.parity import tiny_flow
from tests.parity.engine_harness import events, make_request, pictures, start_core
from tests.parity.harness import Case, Pair, Subject, assert_same, write_adapters
from tests.parity.subjects_flow import BOUNDED_Z_IMAGE, FLUX, QWEN_IMAGE, SCHNELL, Z_IMAGE

CASES: dict[str, tuple[Subject, list[Case]]] = {
    "schnell": (
        SCHNELL,
        [({"guidance_scale": 0.0}, []), ({"guidance_scale": 0.0, "true_cfg_scale": 1.5}, [("a", 1.0)])],
    ),
    "bounded guidance": (BOUNDED_Z_IMAGE, [({}, []), ({"seed": 2, "prompt": "sea"}, [("a", 1.0)])]),
}


@pytest.mark.parametrize("variant", CASES)
def test_variants_equal_diffusers(variant: str, tmp_path: Path) -> None:
    """FLUX.1 without a guidance embedding, and guidance that ends early and whose norm has a bound: in one batch, each
    is the oracle's picture."""
    subject, cases = CASES[variant]
    model = subject.build(tmp_path / "model")
    write_adapters(subject, model, tmp_path)
    pair = Pair(subject, model, "float64", tmp_path)
    requests = [(subject.parameters(**changes), uses) for changes, uses in cases]
    for (wanted, uses), ours in zip(requests, pair.draw_together(requests, ApplicationWay.SLOTS), strict=True):
        assert_same(ours, pair.oracle(wanted, uses), pair.dtype, uses, subject.flips)


def test_bounds_of_guidance_matter(tmp_path: Path) -> None:
    """The bounds of the test above change the picture, or it would prove nothing."""
    drawn = []
    for subject in (Z_IMAGE, BOUNDED_Z_IMAGE):
        pair = Pair(subject, subject.build(tmp_path / subject.name), "float32", tmp_path)
        drawn.append(pair.draw(subject.parameters(), []).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.5


@pytest.mark.parametrize(
    ("subject", "guidance", "multiple"),
    [
        (FLUX, GuidanceKind.DISTILLED, 16),
        (SCHNELL, GuidanceKind.NONE, 16),
        (QWEN_IMAGE, GuidanceKind.CLASSIFIER_FREE, 16),
        (Z_IMAGE, GuidanceKind.CLASSIFIER_FREE, 16),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_families_say_what_they_are(subject: Subject, guidance: GuidanceKind, multiple: int, tmp_path: Path) -> None:
    """What GetServerInfo tells of guidance, sizes and the path."""
    info = load_model(ModelConfig(model=subject.build(tmp_path / "m"), device="cpu")).info
    assert (info.guidance, info.size_multiple_px) == (guidance, multiple)
    assert info.execution is ExecutionPath.STEP_BATCHING


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    """A flow family says at its start which scheduler it takes, not at the first request."""
    from diffusers import DiffusionPipeline, UniPCMultistepScheduler

    tiny_flow.build_flux(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="UniPCMultistepScheduler"):
        load_model(ModelConfig(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("subject", [FLUX, QWEN_IMAGE, Z_IMAGE], ids=lambda subject: subject.name)
def test_the_network_can_be_captured(subject: Subject, tmp_path: Path) -> None:
    """A forward pass looks at no value, which a CUDA graph could not repeat; texts and guidance are mixed here."""
    pair = Pair(subject, subject.build(tmp_path / "m"), "float32", tmp_path)
    wanted = [
        subject.parameters(prompt="a long text that differs in length by over thirty-two tokens"),
        subject.parameters(prompt="sea", guidance_scale=0.0),
    ]
    passes: list[tuple[int, ...]] = []

    def denoise(_: object, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
        real = pair.family.forward(inputs, options)  # fills the tables that are made once
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
            passes.append(tuple(pair.family.forward(fake, options).shape))
        return real

    with torch.no_grad():
        states = [state for each in wanted for state in pair.runner.begin(each, pair.runner.condition(each, ()))]
        pair.family.step(states, denoise)
    assert passes == [(sum(state.rows for state in states), *states[0].latents.shape[1:])]


def test_a_text_leaves_its_image_a_place(tmp_path: Path) -> None:
    """Z-Image's tables of positions end: a longer text is cut, and told of, and does not fail in its first step."""
    pair = Pair(Z_IMAGE, Z_IMAGE.build(tmp_path / "m"), "float32", tmp_path)
    wanted = Z_IMAGE.parameters(prompt="w " * 300, guidance_scale=0.0)
    with torch.no_grad():
        conditioning = pair.runner.condition(wanted, ())
        states = pair.runner.begin(wanted, conditioning)
        pair.family.step(states, lambda _, inputs, options: pair.family.forward(inputs, options))
    assert [each.max_tokens for cut in conditioning.truncations for each in cut] == [224]
    assert states[0].latents.isfinite().all()


@pytest.mark.parametrize("subject", [FLUX, QWEN_IMAGE, Z_IMAGE], ids=lambda subject: subject.name)
def test_an_engine_serves_the_family(subject: Subject, tmp_path: Path) -> None:
    """From warming up to the file: requests that come together, with adapters and prompts of their own, are the
    oracle's pictures."""
    model = subject.build(tmp_path / "model")
    write_adapters(subject, model, tmp_path)
    pair = Pair(subject, model, "float64", tmp_path)
    cases: list[Case] = [
        ({"seed": 1}, [("a", 1.0)]),
        ({"seed": 2, "prompt": "sea"}, [("b", 0.5)]),
        ({"num_images": 2}, []),
    ]
    core = start_core(model, tmp_path)
    try:
        wanted = [(subject.parameters(**changes), uses) for changes, uses in cases]
        jobs = [
            core.engine.submit(make_request(tmp_path, f"r{k}", parameters, uses))
            for k, (parameters, uses) in enumerate(wanted)
        ]
        for job, (parameters, uses) in zip(jobs, wanted, strict=True):
            drawn = np.stack(pictures(events(job)))
            assert_same(drawn, pair.oracle(parameters, uses), pair.dtype, uses, subject.flips)
    finally:
        core.stop()

"""What each model says of negative prompts is what its steps do with them: validation refuses by it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_server.config import ModelConfig
from lora_server.models.pipeline_traits import takes_negative_prompts
from lora_server.models.registry import load_model

from tests.parity.harness import Subject
from tests.parity.subjects_flow import QWEN_IMAGE, Z_IMAGE
from tests.parity.subjects_sd3 import SD3
from tests.parity.subjects_unet import SD1


def load(subject: Subject, folder: Path) -> Any:
    return load_model(ModelConfig(model=subject.build(folder / "model"), device="cpu", dtype="float32"))


@pytest.mark.parametrize("subject", [SD3, SD1, QWEN_IMAGE, Z_IMAGE], ids=lambda subject: subject.name)
def test_guidance_acts_over_the_threshold_and_not_at_it(subject: Subject, tmp_path: Path) -> None:
    """An image takes its negative row exactly where a negative prompt is allowed."""
    family = load(subject, tmp_path)
    threshold = family.info.guidance_threshold
    assert threshold == (0.0 if subject is Z_IMAGE else 1.0)
    assert not family.guides(subject.parameters(guidance_scale=threshold))
    assert family.guides(subject.parameters(guidance_scale=threshold + 0.01))


def test_a_unet_with_distilled_guidance_takes_none(tmp_path: Path) -> None:
    """LCM models: whatever the scale, there is no negative row."""
    family = load(SD1, tmp_path)
    assert family.info.negative_prompts
    family._unet.register_to_config(time_cond_proj_dim=8)
    assert not family.guides(SD1.parameters(guidance_scale=8.0))
    assert not family.info.negative_prompts


def call(prompt: str, guidance_scale: float = 4.5) -> None: ...
def classifier_free(prompt: str, negative_prompt: str = "", guidance_scale: float = 4.5) -> None: ...
def off(prompt: str, negative_prompt: str = "", true_cfg_scale: float = 1.0) -> None: ...
def on(prompt: str, negative_prompt: str = "", true_cfg_scale: float = 4.0) -> None: ...


@pytest.mark.parametrize(("pipeline", "takes"), [(call, False), (classifier_free, True), (off, False), (on, True)])
def test_a_pipeline_without_a_family_is_read_by_its_call(pipeline: Callable[..., None], takes: bool) -> None:
    """True guidance that is off by default cannot be turned on by a request."""
    assert takes_negative_prompts(inspect.signature(pipeline).parameters) is takes

"""What a request may say of guidance depends on the model: what would have no effect is refused by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lora_api.v1 import generation_service_pb2, server_service_pb2
from lora_server.config import LimitsConfig
from lora_server.errors import InvalidRequestError
from lora_server.rpc import convert, validate
from lora_server.types import ExecutionPath, GuidanceKind, ModelDefaults, ModelInfo

FREE = ModelInfo("m", "sd3", "P", "cpu", "float32", ModelDefaults(128, 128, 20, 4.0), 16, 384)
DISTILLED = replace(FREE, guidance=GuidanceKind.DISTILLED)
NONE = replace(FREE, guidance=GuidanceKind.NONE)
OFF = replace(FREE, defaults=ModelDefaults(128, 128, 20, 1.0))
FROM_ZERO = replace(FREE, guidance_threshold=0.0)
UNKNOWN = replace(FREE, guidance_threshold=None)
NO_NEGATIVE = replace(FREE, negative_prompts=False, execution=ExecutionPath.WHOLE_PIPELINE)

ALLOWED: list[tuple[ModelInfo, dict[str, Any]]] = [
    (FREE, {"guidance_scale": 7.0, "negative_prompt": "ring"}),
    (DISTILLED, {"guidance_scale": 3.5}),
    (DISTILLED, {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": "ring"}),
    (DISTILLED, {"true_cfg_scale": 1.0}),
    (NONE, {"guidance_scale": 0.0}),
    (NONE, {"true_cfg_scale": 2.0, "negative_prompt": "ring"}),
    (NO_NEGATIVE, {"guidance_scale": 7.0}),
    (FREE, {"negative_prompt": "ring"}),
    (FREE, {"guidance_scale": 1.0, "negative_prompt": ""}),
    (OFF, {"guidance_scale": 1.01, "negative_prompt": "ring"}),
    (FROM_ZERO, {"guidance_scale": 0.5, "negative_prompt": "ring"}),
    (UNKNOWN, {"guidance_scale": 0.0, "negative_prompt": "ring"}),
]
REFUSED: list[tuple[ModelInfo, dict[str, Any], str]] = [
    (FREE, {"true_cfg_scale": 2.0}, "spec.true_cfg_scale"),
    (DISTILLED, {"true_cfg_scale": 101.0}, "spec.true_cfg_scale"),
    (DISTILLED, {"true_cfg_scale": float("nan")}, "spec.true_cfg_scale"),
    (DISTILLED, {"negative_prompt": "ring"}, "spec.negative_prompt"),
    (DISTILLED, {"negative_prompt": "ring", "true_cfg_scale": 1.0}, "spec.negative_prompt"),
    (NONE, {"guidance_scale": 3.5}, "spec.guidance_scale"),
    (NO_NEGATIVE, {"negative_prompt": "ring"}, "spec.negative_prompt"),
    (FREE, {"negative_prompt": "ring", "guidance_scale": 1.0}, "spec.negative_prompt"),
    (FREE, {"negative_prompt": " ", "guidance_scale": 0.0}, "spec.negative_prompt"),
    (OFF, {"negative_prompt": "ring"}, "spec.negative_prompt"),
    (FROM_ZERO, {"negative_prompt": "ring", "guidance_scale": 0.0}, "spec.negative_prompt"),
    (DISTILLED, {"negative_prompt": "ring", "guidance_scale": 9.0}, "spec.negative_prompt"),
]


def check(model: ModelInfo, fields: dict[str, Any]) -> None:
    spec = generation_service_pb2.GenerationSpec(prompt="a star", **fields)
    rules = validate.RequestRules(LimitsConfig(), model)
    rules.check_generate(generation_service_pb2.GenerateRequest(spec=spec))


@pytest.mark.parametrize(("model", "fields"), ALLOWED)
def test_what_acts_is_allowed(model: ModelInfo, fields: dict[str, Any]) -> None:
    """Nothing is refused that changes the picture, or that is neutral."""
    check(model, fields)


@pytest.mark.parametrize(("model", "fields", "field"), REFUSED)
def test_what_would_have_no_effect_is_refused(model: ModelInfo, fields: dict[str, Any], field: str) -> None:
    """One fault, which names the field."""
    with pytest.raises(InvalidRequestError) as caught:
        check(model, fields)
    assert {fault.field for fault in caught.value.faults} == {field}


def test_server_info_says_what_guidance_does_and_how_requests_run() -> None:
    """A client can tell in advance what a model will refuse, and what it costs."""
    message = convert.model_message(replace(NO_NEGATIVE, guidance=GuidanceKind.DISTILLED))
    assert message.guidance == server_service_pb2.GUIDANCE_KIND_DISTILLED
    assert message.execution == server_service_pb2.EXECUTION_PATH_WHOLE_PIPELINE
    assert "one by one" in message.execution_cost
    assert not message.negative_prompts


def test_the_refusal_says_what_to_set() -> None:
    """With the scale that the model takes by default."""
    with pytest.raises(InvalidRequestError, match=r"no effect at guidance_scale 1: set guidance_scale > 1, or leave"):
        check(OFF, {"negative_prompt": "ring"})

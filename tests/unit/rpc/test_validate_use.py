"""Settings of adapters at the border: every fault by its field, and values as the caller wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from lora_api.v1 import adapter_pb2, adapter_service_pb2, generation_service_pb2
from lora_server.config import LimitsConfig
from lora_server.errors import InvalidRequestError
from lora_server.rpc import convert, validate
from lora_server.rpc.validate_use import MAX_BLOCK_SCALES
from lora_server.types import AppliedAdapter, ModelDefaults, ModelInfo
from lora_server.use_settings import UseSettings

COMPONENTS = ("text_encoder", "transformer")
MODEL = ModelInfo("m", "sd3", "P", "cpu", "float32", ModelDefaults(128, 128, 20, 4.0), 16, 384, COMPONENTS, 6)
RULES = validate.RequestRules(LimitsConfig(), MODEL)


def faults(*uses: dict[str, Any], steps: int | None = None) -> list[str]:
    """The fields at fault in a request with these uses."""
    adapters = [adapter_pb2.AdapterUse(name=f"a{k}", **use) for k, use in enumerate(uses)]
    spec = generation_service_pb2.GenerationSpec(prompt="x", adapters=adapters, num_inference_steps=steps)
    try:
        RULES.check_generate(generation_service_pb2.GenerateRequest(spec=spec))
    except InvalidRequestError as error:
        return [fault.field.removeprefix("spec.adapters") for fault in error.faults]
    return []


NAN = float("nan")


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ({"component_scales": [{"component": "text_encoder", "scale": 0.5}, {"component": "transformer"}]}, []),
        ({"component_scales": [{"component": "unet", "scale": 1}]}, ["[0].component_scales[0].component"]),
        ({"component_scales": [{"component": "transformer"}] * 2}, ["[0].component_scales[1].component"]),
        ({"component_scales": [{"component": "transformer", "scale": NAN}]}, ["[0].component_scales[0].scale"]),
        ({"block_scales": [{"pattern": "transformer_blocks.*.attn", "scale": -100}]}, []),
        ({"block_scales": [{"pattern": "blocks..1"}]}, ["[0].block_scales[0].pattern"]),
        ({"block_scales": [{"pattern": "x"}, {"pattern": "[a]"}]}, ["[0].block_scales[1].pattern"]),
        ({"block_scales": [{"pattern": "x" * 129}]}, ["[0].block_scales[0].pattern"]),
        ({"block_scales": [{"pattern": "x", "scale": 101}]}, ["[0].block_scales[0].scale"]),
        ({"schedule": {"start": 0.25, "end": 0.75}}, []),
        ({"schedule": {}}, []),
        ({"schedule": {"start": -0.1}}, ["[0].schedule.start"]),
        ({"schedule": {"start": NAN}}, ["[0].schedule.start"]),
        ({"schedule": {"start": 0.5, "end": 0.5}}, ["[0].schedule.end"]),
        ({"schedule": {"end": 1.5}}, ["[0].schedule.end"]),
        ({"schedule": {"end": NAN}}, ["[0].schedule.end"]),
        ({"schedule": {"start": 0.96, "end": 0.99}}, ["[0].schedule"]),
    ],
)  # fmt: skip
def test_each_fault_has_its_field(use: dict[str, Any], expected: list[str]) -> None:
    """Unknown, repeated, out of range, or without effect."""
    assert faults(use) == expected


def test_a_schedule_is_held_against_the_steps_of_its_request() -> None:
    """The last of 100 steps is in what holds none of 20; a wrong number of steps is a fault of its own alone."""
    late = {"schedule": {"start": 0.96, "end": 0.99}}
    assert faults(late, steps=100) == []
    assert faults(late, steps=10**6) == ["spec.num_inference_steps"]


def test_block_scales_of_a_request_are_bounded_together() -> None:
    """Their place in an image's metadata is."""
    half = {"block_scales": [{"pattern": "x"}] * (MAX_BLOCK_SCALES // 2)}
    assert faults(half, half) == []
    assert faults(half, half, {"block_scales": [{"pattern": "x"}]}) == [""]


def test_settings_are_the_callers_decimals_there_and_back() -> None:
    """0.1 stays 0.1 on its way to the engine, and comes back in the reply."""
    message = adapter_pb2.AdapterUse(
        name="a",
        component_scales=[{"component": "transformer", "scale": 0.1}],
        block_scales=[{"pattern": "b.1", "scale": 0.7}, {"pattern": "b", "scale": 0}],
        schedule={"start": 0.3},
        use_trigger_words=True,
    )
    settings = convert.adapter_use(message).settings
    assert settings == UseSettings((("transformer", 0.1),), (("b.1", 0.7), ("b", 0.0)), 0.3, 1.0, True)
    back = convert.applied_message(AppliedAdapter("a", 1, "d", 1.0, settings))
    assert (back.component_scales, back.block_scales) == (message.component_scales, message.block_scales)
    assert (back.schedule.start, back.schedule.end) == (message.schedule.start, 1.0)
    assert back.use_trigger_words
    assert not convert.applied_message(AppliedAdapter("a", 1, "d", 1.0)).HasField("schedule")


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"states": [9]}, "states[0]"), ({"states": [3, 0]}, "states[1]"), ({"name_prefix": "A"}, "name_prefix")],
)
def test_filters_of_a_list_are_checked(fields: dict[str, Any], field: str) -> None:
    """A filter that no adapter can pass is a mistake."""
    with pytest.raises(InvalidRequestError) as refused:
        validate.check_list(adapter_service_pb2.ListAdaptersRequest(**fields))
    assert [fault.field for fault in refused.value.faults] == [field]
    validate.check_list(adapter_service_pb2.ListAdaptersRequest(states=[3, 4], name_prefix="ne"))

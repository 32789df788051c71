"""Requests at the border: every fault at once, and nothing but a valid request gets past."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_api.v1 import adapter_pb2, adapter_service_pb2, generation_service_pb2, image_pb2
from lora_server.config import LimitsConfig
from lora_server.errors import InvalidRequestError
from lora_server.rpc import convert, validate
from lora_server.types import ModelDefaults, ModelInfo

MODEL = ModelInfo(
    "m", "sd3", "P", "cpu", "float32", ModelDefaults(128, 128, 20, 4.0), 16, 384, (), 6, schedulers=("ddim", "euler")
)
RULES = validate.RequestRules(LimitsConfig(), MODEL)
INT64 = st.integers(-(2**63), 2**63 - 1)
UINT32 = st.integers(0, 2**32 - 1)
FLOAT = st.floats(width=32)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The strategy, or absent."""
    return st.none() | strategy


SOURCES = st.builds(adapter_pb2.AdapterSource, path=TEXT, id=maybe(INT64), name=maybe(TEXT))
USES = st.one_of(
    st.builds(adapter_pb2.AdapterUse, name=TEXT, scale=maybe(FLOAT), expected_digest=maybe(TEXT)),
    st.builds(adapter_pb2.AdapterUse, id=INT64, scale=maybe(FLOAT)),
    st.builds(adapter_pb2.AdapterUse, digest=TEXT),
    st.builds(adapter_pb2.AdapterUse, source=SOURCES),
    st.just(adapter_pb2.AdapterUse()),
)
GUIDANCE = st.builds(
    image_pb2.SkipLayerGuidance,
    layers=st.lists(UINT32 | st.integers(0, 5), max_size=4),
    scale=maybe(FLOAT),
    start=maybe(FLOAT),
    stop=maybe(FLOAT),
)
SPECS = st.builds(
    generation_service_pb2.GenerationSpec,
    prompt=TEXT,
    negative_prompt=TEXT,
    adapters=st.lists(USES, max_size=10),
    width_px=maybe(UINT32 | st.sampled_from([16, 128, 384])),
    height_px=maybe(UINT32),
    num_inference_steps=maybe(UINT32 | st.integers(0, 30)),
    guidance_scale=maybe(FLOAT),
    seed=maybe(INT64),
    num_images=maybe(UINT32 | st.integers(0, 4)),
    format=st.integers(-5, 9),
    skip_layer_guidance=maybe(GUIDANCE),
    scheduler=maybe(TEXT | st.just("euler")),
    true_cfg_scale=maybe(FLOAT),
)


@settings(max_examples=300, deadline=None)
@given(spec=SPECS, request_id=TEXT, interval=maybe(UINT32))
def test_fuzzed_requests_are_refused_by_field_or_convert(
    spec: generation_service_pb2.GenerationSpec, request_id: str, interval: int | None
) -> None:
    """Whatever the fields hold, the outcome is InvalidRequestError with faults, or parameters in range."""
    request = generation_service_pb2.StreamGenerateRequest(
        spec=spec, request_id=request_id, progress_interval_steps=interval
    )
    try:
        RULES.check_stream(request)
    except InvalidRequestError:
        return
    wanted = convert.parameters(spec, MODEL, request_id or "x")
    assert wanted.prompt.strip()
    assert 16 <= wanted.width_px <= 384
    assert wanted.seeds[-1] < 2**63
    assert 0 <= wanted.guidance_scale <= 100
    assert all(abs(use.scale or 0) <= 100 for use in map(convert.adapter_use, spec.adapters))


def test_all_faults_are_reported_at_once() -> None:
    """One answer names every wrong field."""
    spec = generation_service_pb2.GenerationSpec(
        prompt=" ",
        width_px=100,
        num_images=0,
        guidance_scale=float("nan"),
        adapters=[adapter_pb2.AdapterUse(name="neon"), adapter_pb2.AdapterUse(name="neon", scale=float("inf"))],
    )
    with pytest.raises(InvalidRequestError) as caught:
        RULES.check_generate(generation_service_pb2.GenerateRequest(spec=spec, max_response_bytes=0))
    fields = [fault.field for fault in caught.value.faults]
    assert fields == [
        "spec.prompt",
        "spec.width_px",
        "spec.num_images",
        "spec.guidance_scale",
        "spec.adapters[1].scale",
        "spec.adapters[1]",
        "max_response_bytes",
    ]


@pytest.mark.parametrize(
    ("check", "request_"),
    [
        (validate.check_load, adapter_service_pb2.LoadAdapterRequest()),
        (validate.check_load, adapter_service_pb2.LoadAdapterRequest(source={"path": "a\0"})),
        (validate.check_load, adapter_service_pb2.LoadAdapterRequest(source={"path": "a"}, default_scale=1e9)),
        (validate.check_ref, adapter_pb2.AdapterRef()),
        (validate.check_ref, adapter_pb2.AdapterRef(id=0)),
        (validate.check_pin, adapter_service_pb2.PinAdapterRequest(adapter={"name": "a"}, level=9)),
        (validate.check_pin, adapter_service_pb2.PinAdapterRequest(adapter={"name": "a"}, ttl={"seconds": -1})),
        (validate.check_list, adapter_service_pb2.ListAdaptersRequest(page_size=0)),
    ],
)
def test_control_plane_requests_are_checked(check: Any, request_: Any) -> None:
    """The control plane's faults have fields as well."""
    with pytest.raises(InvalidRequestError):
        check(request_)


@pytest.mark.parametrize(("name", "fits"), [("euler", True), ("", False), ("plms", False)])
def test_schedulers_are_those_that_the_model_offers(name: str, fits: bool) -> None:
    """A scheduler that the model does not offer is refused with the list of those that it does."""
    spec = generation_service_pb2.GenerationSpec(prompt="x", scheduler=name)
    request = generation_service_pb2.GenerateRequest(spec=spec)
    if fits:
        RULES.check_generate(request)
        assert convert.parameters(spec, MODEL, "id").scheduler == name
        return
    with pytest.raises(InvalidRequestError, match="ddim, euler"):
        RULES.check_generate(request)


def test_a_drawn_seed_is_the_same_for_a_retry() -> None:
    """An absent seed comes from the request id, so a retry gets the same picture."""
    spec = generation_service_pb2.GenerationSpec(prompt="x")
    first, second = (convert.parameters(spec, MODEL, "id") for _ in range(2))
    assert first == second
    assert 0 <= first.seed < 2**32
    assert convert.parameters(spec, MODEL, "other").seed != first.seed


def test_work_that_each_field_allows_may_be_too_much_together() -> None:
    """Size, steps and images are multiplied, the model's defaults filled in, and held against the limit."""
    rules = validate.RequestRules(LimitsConfig(max_request_megapixel_steps=1.0), MODEL)
    spec = generation_service_pb2.GenerationSpec(prompt="x", num_inference_steps=30)  # 128 x 128 x 30 = 0.49
    rules.check_generate(generation_service_pb2.GenerateRequest(spec=spec))
    spec.num_images = 3
    with pytest.raises(InvalidRequestError) as refused:
        rules.check_generate(generation_service_pb2.GenerateRequest(spec=spec))
    assert "1.47456 megapixel-steps, over the 1" in refused.value.faults[0].description

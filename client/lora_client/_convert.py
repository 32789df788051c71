"""Values of the client to messages of the contract, and back. Pure functions."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from lora_api.v1 import adapter_pb2, adapter_service_pb2, generation_service_pb2, image_pb2, server_service_pb2

from lora_client.types import (
    Adapter,
    AdapterUsage,
    AdapterUse,
    AdapterUseCount,
    AppliedAdapter,
    Component,
    GenerationOptions,
    Pin,
    Provenance,
    ServerInfo,
    ServerWatch,
    SkipLayerGuidance,
    Stats,
    Version,
)

FORMATS = ("png", "webp", "jpeg")


def stream_request(
    prompt: str, adapters: Sequence[AdapterUse | str], seed: int | None, options: GenerationOptions
) -> generation_service_pb2.StreamGenerateRequest:
    """Builds a request; draws its id, so that a retry is never paid twice.

    Raises:
        ValueError: If an adapter's text or the format is not understood.
    """
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; choose one of {', '.join(FORMATS)}")
    spec = generation_service_pb2.GenerationSpec(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        adapters=[use_message(use) for use in parse_uses(adapters)],
        width_px=options.width_px,
        height_px=options.height_px,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.true_cfg_scale,
        seed=seed,
        num_images=options.num_images,
        format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{options.format.upper()}"),
        scheduler=options.scheduler,
    )
    if options.skip_layer_guidance is not None:
        guidance = options.skip_layer_guidance
        spec.skip_layer_guidance.CopyFrom(
            image_pb2.SkipLayerGuidance(
                layers=guidance.layers, scale=guidance.scale, start=guidance.start, stop=guidance.stop
            )
        )
    request = generation_service_pb2.StreamGenerateRequest(
        spec=spec,
        request_id=options.request_id or uuid.uuid4().hex,
        progress_interval_steps=options.progress_interval_steps,
    )
    if options.preview_interval_steps is not None:
        request.preview.interval_steps = options.preview_interval_steps
    return request


def parse_uses(adapters: Sequence[AdapterUse | str]) -> list[AdapterUse]:
    """Reads adapters that are given as text."""
    return [AdapterUse.parse(use) if isinstance(use, str) else use for use in adapters]


def use_message(use: AdapterUse) -> adapter_pb2.AdapterUse:
    """One adapter of a request."""
    message = adapter_pb2.AdapterUse(
        scale=use.scale,
        expected_digest=use.expected_digest,
        component_scales=[
            adapter_pb2.ComponentScale(component=component, scale=factor)
            for component, factor in use.component_scales.items()
        ],
        block_scales=[
            adapter_pb2.BlockScale(pattern=pattern, scale=factor) for pattern, factor in use.block_scales.items()
        ],
        use_trigger_words=use.use_trigger_words,
    )
    if use.start is not None or use.end is not None:
        message.schedule.CopyFrom(adapter_pb2.ScaleSchedule(start=use.start, end=use.end))
    if use.path is not None:
        message.source.path = use.path
        if use.id is not None:
            message.source.id = use.id
    elif use.name is not None:
        message.name = use.name
    elif use.digest is not None:
        message.digest = use.digest
    elif use.id is not None:
        message.id = use.id
    return message


def list_request(states: Sequence[str], name_prefix: str, page_token: str) -> adapter_service_pb2.ListAdaptersRequest:
    """Asks for a page of adapters; ValueError if a state is unknown."""
    known = [name.removeprefix("ADAPTER_STATE_").lower() for name in adapter_pb2.AdapterState.keys()[1:]]
    unknown = [state for state in states if state not in known]
    if unknown:
        raise ValueError(f"unknown state {unknown[0]!r}; choose of {', '.join(known)}")
    values = [adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.upper()}") for state in states]
    return adapter_service_pb2.ListAdaptersRequest(page_token=page_token, states=values, name_prefix=name_prefix)


def ref_message(adapter: str | int) -> adapter_pb2.AdapterRef:
    """A registered adapter by name, or by id if it is a number."""
    if isinstance(adapter, int):
        return adapter_pb2.AdapterRef(id=adapter)
    return adapter_pb2.AdapterRef(name=adapter)


def adapter(message: adapter_pb2.Adapter) -> Adapter:
    """A registered adapter."""
    pin = None
    if message.HasField("pin"):
        expires = _time(message.pin.expire_time) if message.pin.HasField("expire_time") else None
        pin = Pin(_enum(adapter_pb2.PinLevel, message.pin.level, "PIN_LEVEL_"), expires)
    return Adapter(
        name=message.name,
        ids=tuple(message.ids),
        path=message.source.path,
        versions=tuple(_version(version) for version in message.versions),
        current_digest=message.current_digest,
        pin=pin,
        default_scale=shortest(message.default_scale),
        tenants=tuple(message.tenants.names) if message.HasField("tenants") else None,
    )


def _version(message: adapter_pb2.AdapterVersion) -> Version:
    return Version(
        digest=message.digest,
        size_bytes=message.size_bytes,
        rank=message.rank,
        components=tuple(
            Component(each.name, each.num_modules, each.min_rank, each.max_rank) for each in message.components
        ),
        state=_enum(adapter_pb2.AdapterState, message.state, "ADAPTER_STATE_"),
        load_time=_time(message.load_time) if message.HasField("load_time") else None,
        last_use_time=_time(message.last_use_time) if message.HasField("last_use_time") else None,
        failure=message.failure,
        trigger_words=tuple(message.trigger_words),
    )


def provenance(message: image_pb2.Provenance) -> Provenance:
    """What made an image."""
    guidance = None
    if message.HasField("skip_layer_guidance"):
        slg = message.skip_layer_guidance
        guidance = SkipLayerGuidance(tuple(slg.layers), shortest(slg.scale), shortest(slg.start), shortest(slg.stop))
    return Provenance(
        model=message.model,
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        seed=message.seed,
        num_inference_steps=message.num_inference_steps,
        guidance_scale=shortest(message.guidance_scale),
        width_px=message.width_px,
        height_px=message.height_px,
        adapters=tuple(_applied(each) for each in message.adapters),
        software=message.software,
        skip_layer_guidance=guidance,
        scheduler=message.scheduler if message.HasField("scheduler") else None,
        true_cfg_scale=shortest(message.true_cfg_scale) if message.HasField("true_cfg_scale") else None,
    )


def image_format(value: int) -> str:
    """The file format, in lower case."""
    return _enum(image_pb2.ImageFormat, value, "IMAGE_FORMAT_")


def stats(message: generation_service_pb2.GenerationStats) -> Stats:
    """What a request cost."""
    return Stats(
        request_id=message.request_id,
        queue_time_s=_seconds(message.queue_time),
        adapter_wait_time_s=_seconds(message.adapter_wait_time),
        text_encode_time_s=_seconds(message.text_encode_time),
        denoise_time_s=_seconds(message.denoise_time),
        decode_time_s=_seconds(message.decode_time),
        image_encode_time_s=_seconds(message.image_encode_time),
        total_time_s=_seconds(message.total_time),
        completed_steps=message.completed_steps,
        way=_way(message.way),
        steps_by_way={_way(each.way): each.steps for each in message.steps_by_way},
        mean_batch_images=message.mean_batch_images,
        adapters=tuple(
            AdapterUsage(
                _applied(each.adapter),
                _enum(adapter_pb2.AdapterState, each.state_on_arrival, "ADAPTER_STATE_"),
                _seconds(each.load_time),
            )
            for each in message.adapters
        ),
    )


def _way(value: int) -> str:
    return _enum(generation_service_pb2.ApplicationWay, value, "APPLICATION_WAY_")


def server_info(message: server_service_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server is."""
    return ServerInfo(
        version=message.version,
        start_time=_time(message.start_time),
        model=_section(message.model),
        limits=_section(message.limits),
        cache=_section(message.cache),
        queue=_section(message.queue),
        engine=_section(message.engine),
        retention_time=message.limits.result_retention_time.ToTimedelta(),
    )


def watch_request(interval_s: float, max_adapters: int) -> server_service_pb2.WatchServerRequest:
    """Builds a request to watch the server."""
    request = server_service_pb2.WatchServerRequest(max_adapters=max_adapters)
    request.interval.FromNanoseconds(round(interval_s * 1e9))
    return request


def server_watch(message: server_service_pb2.WatchServerResponse) -> ServerWatch:
    """What the server does."""
    return ServerWatch(
        time=_time(message.time),
        start_time=_time(message.start_time),
        model=message.model,
        queue=_section(message.queue),
        cache=_section(message.cache),
        engine=_section(message.engine),
        adapters=tuple(
            AdapterUseCount(
                each.name, each.uses, _enum(adapter_pb2.AdapterState, each.state, "ADAPTER_STATE_"), each.pinned
            )
            for each in message.adapters
        ),
    )


def _section(message: Message) -> dict[str, object]:
    fields: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # proto3's JSON has 64-bit integers as strings; here they are numbers again.
    return {key: int(value) if isinstance(value, str) and value.isdigit() else value for key, value in fields.items()}


def _applied(message: adapter_pb2.AppliedAdapter) -> AppliedAdapter:
    scheduled = message.HasField("schedule")
    return AppliedAdapter(
        name=message.name,
        id=message.id,
        digest=message.digest,
        scale=shortest(message.scale),
        component_scales={each.component: shortest(each.scale) for each in message.component_scales},
        block_scales={each.pattern: shortest(each.scale) for each in message.block_scales},
        start=shortest(message.schedule.start) if scheduled else 0.0,
        end=shortest(message.schedule.end) if scheduled else 1.0,
        use_trigger_words=message.use_trigger_words,
    )


def _seconds(duration: Any) -> float:
    return float(duration.ToNanoseconds()) / 1e9


def _time(timestamp: Any) -> datetime:
    time: datetime = timestamp.ToDatetime(tzinfo=UTC)
    return time


def _enum(enum: Any, value: int, prefix: str) -> str:
    """The enum's name without its prefix, in lower case; a number that this client does not know stays one."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        return str(value)
    return name.removeprefix(prefix).lower()


def shortest(value: float) -> float:
    """Returns the shortest decimal that is the same float32: what the caller wrote, 0.8, not 0.800000011920929.

    *value* is a float32 already, as protobuf hands it over.
    """
    for digits in range(1, 9):
        candidate = float(f"{value:.{digits}g}")
        if ctypes.c_float(candidate).value == value:  # unlike struct, it makes infinity of what is too large
            return candidate
    return value

"""Messages of the contract to values of the client. Pure functions."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from lora_api.v1 import adapter_pb2, generation_service_pb2, image_pb2, server_service_pb2

from lora_client._requests import HUB_SCHEME, UPLOAD_SCHEME
from lora_client.types import (
    Adapter,
    AdapterUsage,
    AdapterUseCount,
    AppliedAdapter,
    Component,
    LoadReport,
    Pin,
    PromptTruncation,
    Provenance,
    ServerInfo,
    ServerWatch,
    SkipLayerGuidance,
    Stats,
    Version,
)


def adapter(message: adapter_pb2.Adapter) -> Adapter:
    """A registered adapter."""
    pin = None
    if message.HasField("pin"):
        expires = _time(message.pin.expire_time) if message.pin.HasField("expire_time") else None
        pin = Pin(_enum(adapter_pb2.PinLevel, message.pin.level, "PIN_LEVEL_"), expires)
    return Adapter(
        name=message.name,
        ids=tuple(message.ids),
        path=_source_text(message.source),
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
        components=_components(message.components),
        state=_enum(adapter_pb2.AdapterState, message.state, "ADAPTER_STATE_"),
        load_time=_time(message.load_time) if message.HasField("load_time") else None,
        last_use_time=_time(message.last_use_time) if message.HasField("last_use_time") else None,
        failure=message.failure,
        trigger_words=tuple(message.trigger_words),
        report=_report(message.report) if message.HasField("report") else None,
    )


def _source_text(message: adapter_pb2.AdapterSource) -> str:
    kind, hub = message.WhichOneof("location"), message.hub
    if kind == "hub":
        return f"{HUB_SCHEME}{hub.repo_id}{f'/{hub.file}' if hub.file else ''}@{hub.revision}"
    return UPLOAD_SCHEME + message.upload if kind == "upload" else message.path


def _components(messages: Iterable[adapter_pb2.AdapterComponent]) -> tuple[Component, ...]:
    return tuple(Component(each.name, each.num_modules, each.min_rank, each.max_rank) for each in messages)


def _report(message: adapter_pb2.LoadReport) -> LoadReport:
    return LoadReport(
        dialect=message.dialect,
        kinds=tuple(message.kinds),
        min_rank=message.min_rank,
        max_rank=message.max_rank,
        min_alpha=shortest(message.min_alpha),
        max_alpha=shortest(message.max_alpha),
        components=_components(message.components),
        size_bytes=message.size_bytes,
        digest=message.digest,
        base_model=message.base_model,
        title=message.title,
        trigger_words=tuple(message.trigger_words),
        suggested_scale=shortest(message.suggested_scale) if message.HasField("suggested_scale") else None,
        num_unmatched_keys=message.num_unmatched_keys,
        unmatched_keys=tuple(message.unmatched_keys),
        merged_only=message.merged_only,
        warnings=tuple(message.warnings),
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
        prompt_truncations=_truncations(message.prompt_truncations),
    )


def _truncations(messages: Iterable[image_pb2.PromptTruncation]) -> tuple[PromptTruncation, ...]:
    return tuple(
        PromptTruncation(each.encoder, each.max_tokens, each.num_tokens, each.dropped_text, each.negative)
        for each in messages
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
        prompt_truncations=_truncations(message.prompt_truncations),
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

"""Messages of the contract to values of the house, and back. No checks: `rpc.validate` has made them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable

import numpy as np
from google.protobuf import duration_pb2, timestamp_pb2
from lora_api.v1 import adapter_pb2, generation_service_pb2, image_pb2, server_service_pb2

from lora_server.adapters.hub import HubPath
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME
from lora_server.types import (
    AdapterInfo,
    AdapterSource,
    AdapterState,
    AdapterUse,
    ApplicationWay,
    AppliedAdapter,
    ByDigest,
    ById,
    ByName,
    CacheInfo,
    ComponentSummary,
    DeviceMemory,
    EncodedImage,
    EngineInfo,
    GenerationParameters,
    GenerationStats,
    ImageFormat,
    LoadReport,
    ModelInfo,
    PinLevel,
    PromptTruncation,
    Provenance,
    QueueInfo,
    Selector,
    SkipLayerGuidance,
    VersionInfo,
)
from lora_server.use_settings import UseSettings

_FORMATS = {
    image_pb2.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.PNG,
    image_pb2.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    image_pb2.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
    image_pb2.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
}
_PIN_LEVELS = {
    adapter_pb2.PIN_LEVEL_UNSPECIFIED: PinLevel.HOST,
    adapter_pb2.PIN_LEVEL_HOST: PinLevel.HOST,
    adapter_pb2.PIN_LEVEL_DEVICE: PinLevel.DEVICE,
}
_DRAWN_SEED_BYTES = 4


def new_request_id() -> str:
    """Draws a request id."""
    return uuid.uuid4().hex


def seed_of(request_id: str) -> int:
    """The seed of a request that has none: from its id, so that a retry gets the same picture; below 2^32."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:_DRAWN_SEED_BYTES], "big")


def image_format(value: image_pb2.ImageFormat.ValueType) -> ImageFormat:
    """The file format; PNG if unspecified."""
    return _FORMATS[value]


def pin_level(value: adapter_pb2.PinLevel.ValueType) -> PinLevel:
    """The level of a pin; host if unspecified."""
    return _PIN_LEVELS[value]


def parameters(spec: generation_service_pb2.GenerationSpec, model: ModelInfo, request_id: str) -> GenerationParameters:
    """What to draw, with the model's defaults filled in."""
    defaults = model.defaults
    return GenerationParameters(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width_px=spec.width_px if spec.HasField("width_px") else defaults.width_px,
        height_px=spec.height_px if spec.HasField("height_px") else defaults.height_px,
        num_inference_steps=(
            spec.num_inference_steps if spec.HasField("num_inference_steps") else defaults.num_inference_steps
        ),
        guidance_scale=shortest(spec.guidance_scale) if spec.HasField("guidance_scale") else defaults.guidance_scale,
        seed=spec.seed if spec.HasField("seed") else seed_of(request_id),
        num_images=spec.num_images if spec.HasField("num_images") else 1,
        skip_layer_guidance=_skip_layer_guidance(spec) if spec.HasField("skip_layer_guidance") else None,
        scheduler=spec.scheduler if spec.HasField("scheduler") else None,
        true_cfg_scale=shortest(spec.true_cfg_scale) if spec.HasField("true_cfg_scale") else 1.0,
    )


def _skip_layer_guidance(spec: generation_service_pb2.GenerationSpec) -> SkipLayerGuidance:
    message = spec.skip_layer_guidance
    given = {name: shortest(getattr(message, name)) for name in ("scale", "start", "stop") if message.HasField(name)}
    return SkipLayerGuidance(layers=tuple(message.layers), **given)


def adapter_use(use: adapter_pb2.AdapterUse) -> AdapterUse:
    """One adapter of a request."""
    kind = use.WhichOneof("selector")
    selector: Selector
    if kind == "name":
        selector = ByName(use.name)
    elif kind == "id":
        selector = ById(use.id)
    elif kind == "digest":
        selector = ByDigest(use.digest)
    else:
        selector = adapter_source(use.source)
    return AdapterUse(
        selector,
        shortest(use.scale) if use.HasField("scale") else None,
        use.expected_digest if use.HasField("expected_digest") else None,
        use_settings(use),
    )


def use_settings(use: adapter_pb2.AdapterUse) -> UseSettings:
    """Where and when an adapter acts."""
    schedule = use.schedule
    return UseSettings(
        component_scales=tuple((each.component, shortest(each.scale)) for each in use.component_scales),
        block_scales=tuple((each.pattern, shortest(each.scale)) for each in use.block_scales),
        start=shortest(schedule.start) if schedule.HasField("start") else 0.0,
        end=shortest(schedule.end) if schedule.HasField("end") else 1.0,
        use_trigger_words=use.use_trigger_words,
    )


def adapter_source(source: adapter_pb2.AdapterSource) -> AdapterSource:
    """Where an adapter is."""
    kind, path = source.WhichOneof("location"), source.path
    if kind == "upload":
        path = UPLOAD_SCHEME + source.upload
    elif kind == "hub":
        path = str(HubPath(source.hub.repo_id, source.hub.file or None, source.hub.revision or "main"))
    return AdapterSource(
        path,
        source.id if source.HasField("id") else None,
        source.name if source.HasField("name") else None,
    )


def source_message(source: AdapterSource) -> adapter_pb2.AdapterSource:
    """Where an adapter is, without tags."""
    if source.path.startswith(UPLOAD_SCHEME):
        return adapter_pb2.AdapterSource(upload=source.path.removeprefix(UPLOAD_SCHEME))
    if source.path.startswith(HUB_SCHEME):
        path = HubPath.parse(source.path.removeprefix(HUB_SCHEME))
        hub = adapter_pb2.HubSource(repo_id=path.repo, file=path.file or "", revision=path.revision)
        return adapter_pb2.AdapterSource(hub=hub)
    return adapter_pb2.AdapterSource(path=source.path)


def adapter_ref(ref: adapter_pb2.AdapterRef) -> ByName | ById:
    """Which adapter."""
    return ByName(ref.name) if ref.WhichOneof("selector") == "name" else ById(ref.id)


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a message."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def timestamp(unix_s: float) -> timestamp_pb2.Timestamp:
    """Unix time as a message."""
    message = timestamp_pb2.Timestamp()
    message.FromNanoseconds(round(unix_s * 1e9))
    return message


def adapter_message(info: AdapterInfo) -> adapter_pb2.Adapter:
    """A registered adapter."""
    message = adapter_pb2.Adapter(
        name=info.name,
        ids=info.ids,
        source=source_message(info.source),
        versions=[_version_message(version) for version in info.versions],
        current_digest=info.current_digest,
        default_scale=info.default_scale,
    )
    if info.tenants is not None:
        message.tenants.names.extend(sorted(info.tenants))
    if info.pin is not None:
        message.pin.level = adapter_pb2.PinLevel.Value(f"PIN_LEVEL_{info.pin.level.name}")
        if info.pin.expire_time_s is not None:
            message.pin.expire_time.CopyFrom(timestamp(info.pin.expire_time_s))
    return message


def state_value(state: AdapterState) -> adapter_pb2.AdapterState.ValueType:
    """A state as the contract's enum."""
    return adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.name}")


def _version_message(version: VersionInfo) -> adapter_pb2.AdapterVersion:
    components = [_component_message(each) for each in version.components]
    return adapter_pb2.AdapterVersion(
        digest=version.digest,
        size_bytes=version.size_bytes,
        rank=version.rank,
        components=components,
        state=state_value(version.state),
        load_time=timestamp(version.load_time_s) if version.load_time_s is not None else None,
        last_use_time=timestamp(version.last_use_time_s) if version.last_use_time_s is not None else None,
        failure=version.failure,
        trigger_words=version.trigger_words,
        report=_report_message(version.report) if version.report is not None else None,
    )


def _component_message(component: ComponentSummary) -> adapter_pb2.AdapterComponent:
    return adapter_pb2.AdapterComponent(**{name: getattr(component, name) for name in component.__slots__})


def _report_message(report: LoadReport) -> adapter_pb2.LoadReport:
    """A report; its fields have the contract's names."""
    values = {name: getattr(report, name) for name in report.__slots__ if name != "components"}
    return adapter_pb2.LoadReport(**values, components=[_component_message(each) for each in report.components])


def applied_message(adapter: AppliedAdapter) -> adapter_pb2.AppliedAdapter:
    """An adapter as it was applied."""
    settings = adapter.settings
    return adapter_pb2.AppliedAdapter(
        name=adapter.name,
        id=adapter.id,
        digest=adapter.digest,
        scale=adapter.scale,
        component_scales=[
            adapter_pb2.ComponentScale(component=component, scale=factor)
            for component, factor in settings.component_scales
        ],
        block_scales=[
            adapter_pb2.BlockScale(pattern=pattern, scale=factor) for pattern, factor in settings.block_scales
        ],
        schedule=adapter_pb2.ScaleSchedule(start=settings.start, end=settings.end) if settings.scheduled else None,
        use_trigger_words=settings.use_trigger_words,
    )


def image_info(image: EncodedImage) -> image_pb2.ImageInfo:
    """What an image is, without its bytes."""
    return image_pb2.ImageInfo(
        index=image.index,
        format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image.format.name}"),
        size_bytes=len(image.data),
        sha256=image.sha256,
        provenance=_provenance_message(image.provenance),
    )


def _provenance_message(provenance: Provenance) -> image_pb2.Provenance:
    message = image_pb2.Provenance(
        model=provenance.model,
        prompt=provenance.prompt,
        negative_prompt=provenance.negative_prompt,
        seed=provenance.seed,
        num_inference_steps=provenance.num_inference_steps,
        guidance_scale=provenance.guidance_scale,
        width_px=provenance.width_px,
        height_px=provenance.height_px,
        adapters=[applied_message(adapter) for adapter in provenance.adapters],
        software=provenance.software,
        scheduler=provenance.scheduler,
        true_cfg_scale=provenance.true_cfg_scale,
        prompt_truncations=_truncation_messages(provenance.prompt_truncations),
    )
    guidance = provenance.skip_layer_guidance
    if guidance is not None:
        message.skip_layer_guidance.CopyFrom(
            image_pb2.SkipLayerGuidance(
                layers=guidance.layers, scale=guidance.scale, start=guidance.start, stop=guidance.stop
            )
        )
    return message


def _truncation_messages(truncations: Iterable[PromptTruncation]) -> list[image_pb2.PromptTruncation]:
    """What was cut off; its fields have the contract's names."""
    return [
        image_pb2.PromptTruncation(**{name: getattr(each, name) for name in each.__slots__}) for each in truncations
    ]


def engine_info_message(info: EngineInfo) -> server_service_pb2.EngineInfo:
    """The engine's counters."""
    return server_service_pb2.EngineInfo(
        base_steps=info.steps_by_way.get(ApplicationWay.BASE, 0),
        merged_steps=info.steps_by_way.get(ApplicationWay.MERGED, 0),
        slots_steps=info.steps_by_way.get(ApplicationWay.SLOTS, 0),
        image_steps=info.image_steps,
        switches=info.switches,
        page_writes=info.page_writes,
        compiles=info.compiles,
        captures=info.captures,
        prompt_hits=info.prompt_hits,
        prompt_misses=info.prompt_misses,
        finished_requests=info.finished_requests,
        failed_requests=info.failed_requests,
        finished_images=info.finished_images,
        active_images=info.active_images,
        restarts=info.restarts,
        device_memory=_memory_message(info.device_memory),
    )


def _memory_message(memory: DeviceMemory | None) -> server_service_pb2.DeviceMemory | None:
    if memory is None:
        return None
    return server_service_pb2.DeviceMemory(**{name: getattr(memory, name) for name in memory.__slots__})


def cache_info_message(info: CacheInfo) -> server_service_pb2.CacheInfo:
    """The books of the cache."""
    return server_service_pb2.CacheInfo(**{name: getattr(info, name) for name in info.__slots__})


def queue_info_message(info: QueueInfo) -> server_service_pb2.QueueInfo:
    """The queue."""
    return server_service_pb2.QueueInfo(
        queued_requests=info.queued_requests,
        running_requests=info.running_requests,
        max_queued_requests=info.max_queued_requests,
        max_queued_per_tenant=info.max_queued_per_tenant,
        waiting_tenants=info.waiting_tenants,
        estimated_wait=None if info.estimated_wait_s is None else duration(info.estimated_wait_s),
        unread_bytes=info.unread_bytes,
        max_unread_bytes=info.max_unread_bytes,
        retained_bytes=info.retained_bytes,
    )


def stats_message(stats: GenerationStats) -> generation_service_pb2.GenerationStats:
    """What a request cost."""
    ways = {way: generation_service_pb2.ApplicationWay.Value(f"APPLICATION_WAY_{way.name}") for way in ApplicationWay}
    return generation_service_pb2.GenerationStats(
        request_id=stats.request_id,
        queue_time=duration(stats.queue_time_s),
        adapter_wait_time=duration(stats.adapter_wait_time_s),
        text_encode_time=duration(stats.text_encode_time_s),
        denoise_time=duration(stats.denoise_time_s),
        decode_time=duration(stats.decode_time_s),
        image_encode_time=duration(stats.image_encode_time_s),
        total_time=duration(stats.total_time_s),
        completed_steps=stats.completed_steps,
        way=ways[stats.way],
        steps_by_way=[
            generation_service_pb2.StepsByWay(way=ways[way], steps=steps)
            for way, steps in sorted(stats.steps_by_way.items(), key=lambda item: item[0].value)
        ],
        mean_batch_images=stats.mean_batch_images,
        adapters=[
            adapter_pb2.AdapterUsage(
                adapter=applied_message(usage.adapter),
                state_on_arrival=state_value(usage.state_on_arrival),
                load_time=duration(usage.load_time_s),
            )
            for usage in stats.adapters
        ],
        prompt_truncations=_truncation_messages(stats.prompt_truncations),
    )


def model_message(model: ModelInfo) -> server_service_pb2.ModelInfo:
    """The served model."""
    return server_service_pb2.ModelInfo(
        name=model.name,
        family=model.family,
        pipeline_class=model.pipeline_class,
        device=model.device,
        dtype=model.dtype,
        defaults=server_service_pb2.GenerationDefaults(
            width_px=model.defaults.width_px,
            height_px=model.defaults.height_px,
            num_inference_steps=model.defaults.num_inference_steps,
            guidance_scale=model.defaults.guidance_scale,
            adapter_scale=1.0,
        ),
        adaptable_components=model.adaptable_components,
        num_skippable_layers=model.num_skippable_layers,
        schedulers=model.schedulers,
        guidance=server_service_pb2.GuidanceKind.Value(f"GUIDANCE_KIND_{model.guidance.name}"),
        execution=server_service_pb2.ExecutionPath.Value(f"EXECUTION_PATH_{model.execution.name}"),
        execution_cost=model.execution.cost,
        negative_prompts=model.negative_prompts,
    )


def shortest(value: float) -> float:
    """Returns the shortest decimal that is the same float32: what the caller wrote, 0.8, not 0.800000011920929."""
    return float(str(np.float32(value)))

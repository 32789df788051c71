"""Values of the client to messages of the contract. Pure functions."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence

from lora_api.v1 import adapter_pb2, adapter_service_pb2, generation_service_pb2, image_pb2, server_service_pb2

from lora_client._fields import message, real, seconds, texts
from lora_client.types import AdapterUse, GenerationOptions, SkipLayerGuidance

FORMATS = ("png", "webp", "jpeg")
UPLOAD_SCHEME = "upload://"
HUB_SCHEME = "hub://"
_HUB_REVISION = r"(?!.*\.safetensors$)[^@]+"  # an @ may stand in the file's name, too
_HUB_PATH = re.compile(rf"(?P<repo>[^/@]+/[^/@]+)(?:/(?P<file>.+?))?(?:@(?P<revision>{_HUB_REVISION}))?", re.DOTALL)
_PIN_LEVELS = {"host": adapter_pb2.PIN_LEVEL_HOST, "device": adapter_pb2.PIN_LEVEL_DEVICE}


def stream_request(
    prompt: str, uses: Sequence[AdapterUse], seed: int | None, options: GenerationOptions
) -> generation_service_pb2.StreamGenerateRequest:
    """Builds a request; draws its id, so that a retry is never paid twice.

    Raises:
        TypeError, ValueError: If a value is not of its type or range, or the format is unknown.
    """
    if not isinstance(options, GenerationOptions):
        raise TypeError(f"options is a GenerationOptions, not {type(options).__name__}")
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; choose one of {', '.join(FORMATS)}")
    spec = message(
        generation_service_pb2.GenerationSpec,
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        adapters=[use_message(use) for use in uses],
        width_px=options.width_px,
        height_px=options.height_px,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.true_cfg_scale,
        seed=seed,
        num_images=options.num_images,
        format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{options.format.upper()}"),
        scheduler=options.scheduler,
        skip_layer_guidance=_skip_layer_guidance(options.skip_layer_guidance),
    )
    interval = options.preview_interval_steps
    preview = None if interval is None else message(generation_service_pb2.PreviewOptions, interval_steps=interval)
    return message(
        generation_service_pb2.StreamGenerateRequest,
        spec=spec,
        request_id=options.request_id or uuid.uuid4().hex,
        progress_interval_steps=options.progress_interval_steps,
        preview=preview,
    )


def _skip_layer_guidance(guidance: SkipLayerGuidance | None) -> image_pb2.SkipLayerGuidance | None:
    if guidance is None:
        return None
    if not isinstance(guidance, SkipLayerGuidance):
        raise TypeError(f"skip_layer_guidance is a SkipLayerGuidance, not {type(guidance).__name__}")
    return message(
        image_pb2.SkipLayerGuidance,
        layers=guidance.layers,
        scale=guidance.scale,
        start=guidance.start,
        stop=guidance.stop,
    )


def use_message(use: AdapterUse) -> adapter_pb2.AdapterUse:
    """One adapter of a request; TypeError or ValueError if a value is not of its type or range."""
    selected: dict[str, object] = {"name": use.name, "digest": use.digest, "id": use.id}
    if use.path is not None:
        selected = {"source": source_message(use.path, id=use.id)}
    schedule = None
    if use.start is not None or use.end is not None:
        schedule = message(adapter_pb2.ScaleSchedule, start=use.start, end=use.end)
    return message(
        adapter_pb2.AdapterUse,
        **selected,
        scale=use.scale,
        expected_digest=use.expected_digest,
        component_scales=[
            message(adapter_pb2.ComponentScale, component=component, scale=factor)
            for component, factor in _factors("component_scales", use.component_scales)
        ],
        block_scales=[
            message(adapter_pb2.BlockScale, pattern=pattern, scale=factor)
            for pattern, factor in _factors("block_scales", use.block_scales)
        ],
        use_trigger_words=use.use_trigger_words,
        schedule=schedule,
    )


def _factors(field: str, factors: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    if not isinstance(factors, Mapping):
        raise TypeError(f"{field} is a mapping such as {{'text_encoder': 0.5}}, not {type(factors).__name__}")
    return [(name, real(f"{field}[{name!r}]", factor)) for name, factor in factors.items()]


def ref_message(adapter: str | int) -> adapter_pb2.AdapterRef:
    """A registered adapter by name, or by id if it is a number; TypeError if it is neither."""
    if isinstance(adapter, str):
        return message(adapter_pb2.AdapterRef, name=adapter)
    return message(adapter_pb2.AdapterRef, id=adapter)


def source_message(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    id: int | None = None,  # noqa: A002 - the contract's word
) -> adapter_pb2.AdapterSource:
    """A source as people write it: a path, `upload://DIGEST`, or `hub://OWNER/NAME[/FILE][@REVISION]`.

    Raises:
        TypeError: If it is no path.
        ValueError: If it begins as one of the hub, and is none.
    """
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"path: {path!r} is not text")
    if path.startswith(HUB_SCHEME):
        match = _HUB_PATH.fullmatch(path.removeprefix(HUB_SCHEME))
        if match is None:
            raise ValueError(f"{path!r} is not hub://OWNER/NAME[/FILE][@REVISION]")
        hub = message(
            adapter_pb2.HubSource, repo_id=match["repo"], file=match["file"] or "", revision=match["revision"] or ""
        )
        return message(adapter_pb2.AdapterSource, hub=hub, name=name, id=id)
    if path.startswith(UPLOAD_SCHEME):
        return message(adapter_pb2.AdapterSource, upload=path.removeprefix(UPLOAD_SCHEME), name=name, id=id)
    return message(adapter_pb2.AdapterSource, path=path, name=name, id=id)


def load_request(
    path: str,
    *,
    name: str | None,
    id: int | None,  # noqa: A002 - the contract's word
    default_scale: float | None,
    replace: bool,
    allow_partial: bool,
    tenants: Sequence[str] | None,
) -> adapter_service_pb2.LoadAdapterRequest:
    """Asks to load the adapter at *path* on the server; without *tenants* they stay. ValueError as `source_message`."""
    return message(
        adapter_service_pb2.LoadAdapterRequest,
        source=source_message(path, id=id, name=name),
        default_scale=default_scale,
        replace=replace,
        allow_partial=allow_partial,
        tenants=_tenants(tenants),
    )


def _tenants(names: Sequence[str] | None) -> adapter_pb2.TenantList | None:
    return None if names is None else message(adapter_pb2.TenantList, names=texts("tenants", names))


def upload_manifest(
    name: str, *, default_scale: float | None, replace: bool, allow_partial: bool, tenants: Sequence[str] | None
) -> adapter_service_pb2.UploadManifest:
    """What an upload is to become; its files are added by `_upload.requests`."""
    return message(
        adapter_service_pb2.UploadManifest,
        name=name,
        default_scale=default_scale,
        replace=replace,
        allow_partial=allow_partial,
        tenants=_tenants(tenants),
    )


def pin_request(adapter: str | int, level: str, ttl_s: float | None) -> adapter_service_pb2.PinAdapterRequest:
    """Asks for a pin at *level*, `host` or `device`.

    Raises:
        ValueError: If the level is neither.
    """
    if level not in _PIN_LEVELS:
        raise ValueError(f"unknown pin level {level!r}; choose of {', '.join(_PIN_LEVELS)}")
    request = adapter_service_pb2.PinAdapterRequest(adapter=ref_message(adapter), level=_PIN_LEVELS[level])
    if ttl_s is not None:
        request.ttl.FromNanoseconds(int(seconds("ttl_s", ttl_s) * 1e9))
    return request


def list_request(states: Sequence[str], name_prefix: str, page_token: str) -> adapter_service_pb2.ListAdaptersRequest:
    """Asks for a page of adapters; ValueError if a state is unknown."""
    known = [name.removeprefix("ADAPTER_STATE_").lower() for name in adapter_pb2.AdapterState.keys()[1:]]
    states = texts("states", states)
    unknown = [state for state in states if state not in known]
    if unknown:
        raise ValueError(f"unknown state {unknown[0]!r}; choose of {', '.join(known)}")
    values = [adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.upper()}") for state in states]
    return message(
        adapter_service_pb2.ListAdaptersRequest, page_token=page_token, states=values, name_prefix=name_prefix
    )


def watch_request(interval_s: float, max_adapters: int) -> server_service_pb2.WatchServerRequest:
    """Builds a request to watch the server."""
    request = message(server_service_pb2.WatchServerRequest, max_adapters=max_adapters)
    request.interval.FromNanoseconds(round(seconds("interval_s", interval_s) * 1e9))
    return request

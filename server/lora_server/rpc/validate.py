"""The faults of a request, found at once, before any work; pure functions of the message, the limits and the model.

Whatever can be repeated is counted before any of it is looked at, and faults are made one by one, as they are asked
for: a message of 256 KiB has room for 128,000 elements.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import chain

from lora_api.v1 import adapter_pb2, adapter_service_pb2, generation_service_pb2, image_pb2

from lora_server.adapters.naming import MAX_ID, NAME_RULE, file_name_fault, is_valid_digest, is_valid_name
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME
from lora_server.config import LimitsConfig
from lora_server.errors import FieldFault, InvalidRequestError
from lora_server.rpc.validate_use import count_faults, settings_faults
from lora_server.security.tokens import TENANT_PATTERN
from lora_server.types import GuidanceKind, ModelInfo

MAX_SCALE = 100.0
MAX_RESPONSE_BYTES = 2**31 - 1
MAX_PAGE_SIZE = 1000
MAX_UPLOAD_FILES = 64
MAX_TENANTS = 256
MAX_STATES = 16
_MAX_PATH_CHARS = 4096
_MAX_PAGE_TOKEN_CHARS = 1024
_MAX_FILE_PATH_CHARS = 1024
_MAX_INTERVAL = 1000
_SHOWN_CHARS = 80
"""Of a value that a fault repeats."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UPLOAD_SUFFIXES = (".safetensors", ".json", ".md")
_HUB_REPO = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}")
_HUB_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
MAX_REQUEST_ID_CHARS = 64
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_REQUEST_ID_CHARS}}}")
Faults = Iterator[FieldFault]


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What a request may ask of this server."""

    limits: LimitsConfig
    model: ModelInfo

    @property
    def max_side_px(self) -> int:
        """The largest width or height, by the model and by configuration."""
        return min(self.limits.max_side_px, self.model.max_side_px)

    def check_generate(self, request: generation_service_pb2.GenerateRequest) -> None:
        """Raises InvalidRequestError with every fault of a unary request."""
        _raise(chain(self._request(request), _response_limit(request)))

    def check_stream(self, request: generation_service_pb2.StreamGenerateRequest) -> None:
        """Raises InvalidRequestError with every fault of a streaming request."""
        _raise(chain(self._request(request), _intervals(request)))

    def _request(
        self, request: generation_service_pb2.GenerateRequest | generation_service_pb2.StreamGenerateRequest
    ) -> Faults:
        if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
            yield FieldFault("request_id", "must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
        if not request.HasField("spec"):
            yield FieldFault("spec", "is required")
            return
        spec = request.spec
        yield from self._prompts(spec)
        yield from self._sizes(spec)
        yield from self._numbers(spec)
        yield from self._work(spec)
        yield from self._guidance(spec)
        yield from self._adapters(spec)
        if spec.format not in image_pb2.ImageFormat.values():
            yield FieldFault("spec.format", f"{spec.format} is not an ImageFormat")
        if spec.HasField("skip_layer_guidance"):
            yield from self._skip_layers(spec)
        if spec.HasField("scheduler") and spec.scheduler not in self.model.schedulers:
            yield FieldFault("spec.scheduler", f"is {spec.scheduler[:64]!r}; {self._schedulers()}")

    def _schedulers(self) -> str:
        if not self.model.schedulers:
            return f"the model {self.model.name!r} has its own scheduler only"
        return f"must be one of {', '.join(self.model.schedulers)}"

    def _prompts(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        if not spec.prompt.strip():
            yield FieldFault("spec.prompt", "must not be empty")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(spec, name)) > self.limits.max_prompt_chars:
                yield FieldFault(f"spec.{name}", f"has over {self.limits.max_prompt_chars} characters")

    def _sizes(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        multiple = self.model.size_multiple_px
        for name in ("width_px", "height_px"):
            value = getattr(spec, name)
            if spec.HasField(name) and not (multiple <= value <= self.max_side_px and value % multiple == 0):
                yield FieldFault(
                    f"spec.{name}",
                    f"is {value}; must be a multiple of {multiple} from {multiple} to {self.max_side_px}",
                )

    def _numbers(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        if spec.HasField("num_inference_steps"):
            yield from _between(
                "spec.num_inference_steps", spec.num_inference_steps, 1, self.limits.max_inference_steps
            )
        if spec.HasField("num_images"):
            yield from _between("spec.num_images", spec.num_images, 1, self.limits.max_images_per_request)
        if spec.HasField("guidance_scale"):
            yield from _between("spec.guidance_scale", spec.guidance_scale, 0, MAX_SCALE)
        if spec.HasField("seed"):
            images = min(spec.num_images, self.limits.max_images_per_request) if spec.HasField("num_images") else 1
            yield from _between("spec.seed", spec.seed, 0, MAX_ID - max(images, 1))

    def _work(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        """What each field allows may be too much together."""
        most, defaults = self.limits.max_request_megapixel_steps, self.model.defaults
        if most is None:
            return
        width = spec.width_px if spec.HasField("width_px") else defaults.width_px
        height = spec.height_px if spec.HasField("height_px") else defaults.height_px
        steps = spec.num_inference_steps if spec.HasField("num_inference_steps") else defaults.num_inference_steps
        images = spec.num_images if spec.HasField("num_images") else 1
        work = width * height * steps * images / 1e6
        if work > most:
            asked = f"{width}x{height} pixels x {steps} steps x {images} images are {work:g} megapixel-steps"
            yield FieldFault("spec", f"{asked}, over the {most:g} of this server; ask for less of any")

    def _guidance(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        """What guidance means depends on the model; what would have no effect is refused."""
        model = self.model
        if spec.HasField("true_cfg_scale"):
            yield from _between("spec.true_cfg_scale", spec.true_cfg_scale, 0, MAX_SCALE)
            if not model.has_true_cfg:
                yield FieldFault("spec.true_cfg_scale", f"the model {model.name!r} has guidance_scale for this")
        if model.guidance is GuidanceKind.NONE and spec.guidance_scale not in (0, 1):
            yield FieldFault("spec.guidance_scale", f"the model {model.name!r} has no guidance; leave it out")
        if spec.negative_prompt:
            yield from self._negative_prompt(spec)

    def _negative_prompt(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        """Something to avoid is avoided, or refused."""
        model, field = self.model, "spec.negative_prompt"
        scale = spec.guidance_scale if spec.HasField("guidance_scale") else model.defaults.guidance_scale
        if not model.negative_prompts:
            yield FieldFault(field, f"has no effect: the model {model.name!r} takes none; leave it out")
        elif model.has_true_cfg:
            if not spec.true_cfg_scale > 1:
                yield FieldFault(
                    field, "has no effect on this model without true_cfg_scale > 1; set it, or leave this out"
                )
        elif model.guidance_threshold is not None and not scale > model.guidance_threshold:
            needed = f"guidance_scale > {model.guidance_threshold:g}"
            yield FieldFault(field, f"has no effect at guidance_scale {scale:g}: set {needed}, or leave this out")

    def _adapters(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        if len(spec.adapters) > self.limits.max_adapters_per_request:
            yield FieldFault("spec.adapters", f"has over {self.limits.max_adapters_per_request} adapters")
            return
        counts = list(count_faults(spec.adapters, self.model))
        yield from counts
        if counts:
            return
        num_steps = self._num_steps(spec)
        seen: dict[object, int] = {}
        for place, use in enumerate(spec.adapters):
            field = f"spec.adapters[{place}]"
            yield from _use(field, use)
            yield from settings_faults(field, use, self.model, num_steps)
            key = _selector_key(use)
            if key is not None and key in seen:
                yield FieldFault(field, f"is the adapter of spec.adapters[{seen[key]}] again")
            seen.setdefault(key, place)

    def _num_steps(self, spec: generation_service_pb2.GenerationSpec) -> int:
        """How many steps the request has; 0 if that is a fault of its own."""
        if not spec.HasField("num_inference_steps"):
            return self.model.defaults.num_inference_steps
        return spec.num_inference_steps if spec.num_inference_steps <= self.limits.max_inference_steps else 0

    def _skip_layers(self, spec: generation_service_pb2.GenerationSpec) -> Faults:
        guidance, field = spec.skip_layer_guidance, "spec.skip_layer_guidance"
        layers, count = guidance.layers, self.model.num_skippable_layers
        if not count:
            yield FieldFault(field, f"the model {self.model.name!r} does not have it")
            return
        if not 1 <= len(layers) <= count or len(set(layers)) < len(layers) or max(layers) >= count:
            yield FieldFault(f"{field}.layers", f"must name blocks from 0 to {count - 1}, each once, at least one")
        scale = spec.guidance_scale if spec.HasField("guidance_scale") else self.model.defaults.guidance_scale
        if not scale > 1:
            yield FieldFault(field, "needs guidance_scale > 1")
        start = guidance.start if guidance.HasField("start") else 0.01
        stop = guidance.stop if guidance.HasField("stop") else 0.2
        if guidance.HasField("scale"):
            yield from _between(f"{field}.scale", guidance.scale, 0, MAX_SCALE)
        yield from _between(f"{field}.start", start, 0, 1)
        if not start <= stop <= 1:
            yield FieldFault(f"{field}.stop", "must be from start to 1")


def check_load(request: adapter_service_pb2.LoadAdapterRequest) -> None:
    """Raises InvalidRequestError with every fault of a LoadAdapterRequest."""
    _raise(_load(request))


def _load(request: adapter_service_pb2.LoadAdapterRequest) -> Faults:
    if request.HasField("source"):
        yield from _source("source", request.source)
    else:
        yield FieldFault("source", "is required")
    if request.HasField("default_scale"):
        yield from _between("default_scale", request.default_scale, -MAX_SCALE, MAX_SCALE)
    yield from _tenants("tenants", request.tenants)


def check_manifest(manifest: adapter_service_pb2.UploadManifest) -> None:
    """Raises InvalidRequestError with every fault of the manifest of an upload."""
    _raise(_manifest(manifest))


def _manifest(manifest: adapter_service_pb2.UploadManifest) -> Faults:
    yield from _name("manifest.name", manifest.name)
    if 1 <= len(manifest.files) <= MAX_UPLOAD_FILES:
        yield from _files(manifest)
    else:
        yield FieldFault("manifest.files", f"must be 1 to {MAX_UPLOAD_FILES}, not {len(manifest.files)}")
    if manifest.HasField("default_scale"):
        yield from _between("manifest.default_scale", manifest.default_scale, -MAX_SCALE, MAX_SCALE)
    yield from _tenants("manifest.tenants", manifest.tenants)


def _files(manifest: adapter_service_pb2.UploadManifest) -> Faults:
    seen: set[str] = set()
    for k, file in enumerate(manifest.files):
        field = f"manifest.files[{k}]"
        fault = _path_fault(file.path, _UPLOAD_SUFFIXES, max_parts=2)
        path = unicodedata.normalize("NFC", file.path[:_MAX_FILE_PATH_CHARS])
        if fault is None and path in seen:
            fault = f"{file.path!r} is there twice"
        if fault is not None:
            yield FieldFault(f"{field}.path", fault)
        seen.add(path)
        if _SHA256.fullmatch(file.sha256) is None:
            yield FieldFault(f"{field}.sha256", "must be 64 lower-case hex digits")


def _tenants(field: str, tenants: adapter_pb2.TenantList) -> Faults:
    if len(tenants.names) > MAX_TENANTS:
        yield _too_many(f"{field}.names", tenants.names, MAX_TENANTS)
        return
    for k, name in enumerate(tenants.names):
        if TENANT_PATTERN.fullmatch(name) is None:
            detail = "must be 1 to 64 characters of [A-Za-z0-9._-], the first a letter or digit"
            yield FieldFault(f"{field}.names[{k}]", detail)


def check_ref(ref: adapter_pb2.AdapterRef) -> None:
    """Raises InvalidRequestError if *ref* does not select an adapter."""
    _raise(_ref(ref))


def check_pin(request: adapter_service_pb2.PinAdapterRequest) -> None:
    """Raises InvalidRequestError with every fault of a PinAdapterRequest."""
    _raise(_pin(request))


def _pin(request: adapter_service_pb2.PinAdapterRequest) -> Faults:
    yield from _ref(request.adapter)
    if request.level not in adapter_pb2.PinLevel.values():
        yield FieldFault("level", f"{request.level} is not a PinLevel")
    if request.HasField("ttl") and not 1 <= request.ttl.seconds <= 10**9:
        yield FieldFault("ttl", "must be at least one second, and at most 10^9")


def check_list(request: adapter_service_pb2.ListAdaptersRequest) -> None:
    """Raises InvalidRequestError with every fault of a ListAdaptersRequest but its page token's."""
    _raise(_list(request))


def _list(request: adapter_service_pb2.ListAdaptersRequest) -> Faults:
    if request.HasField("page_size"):
        yield from _between("page_size", request.page_size, 1, MAX_PAGE_SIZE)
    if len(request.page_token) > _MAX_PAGE_TOKEN_CHARS:
        yield FieldFault("page_token", "is not a token of this server")
    if request.name_prefix and not is_valid_name(request.name_prefix):
        yield FieldFault("name_prefix", "no name begins like this; names have a-z, 0-9, '.', '_' and '-'")
    if len(request.states) > MAX_STATES:
        yield _too_many("states", request.states, MAX_STATES)
        return
    for k, state in enumerate(request.states):
        if state not in adapter_pb2.AdapterState.values() or not state:
            yield FieldFault(f"states[{k}]", f"{state} is not a state that an adapter can be in")


def _raise(faults: Iterable[FieldFault]) -> None:
    found = iter(faults)
    first = next(found, None)
    if first is not None:
        raise InvalidRequestError(chain([first], found))


def _too_many(field: str, elements: Sized, most: int) -> FieldFault:
    return FieldFault(field, f"has {len(elements)} elements; at most {most}")


def _intervals(request: generation_service_pb2.StreamGenerateRequest) -> Faults:
    if request.HasField("progress_interval_steps"):
        yield from _between("progress_interval_steps", request.progress_interval_steps, 1, _MAX_INTERVAL)
    if request.HasField("preview") and request.preview.HasField("interval_steps"):
        yield from _between("preview.interval_steps", request.preview.interval_steps, 1, _MAX_INTERVAL)


def _between(field: str, value: float, low: float, high: float) -> Faults:
    if not low <= value <= high:  # also for NaN
        yield FieldFault(field, f"is {value}; must be from {low:g} to {high:g}")


def _response_limit(request: generation_service_pb2.GenerateRequest) -> Faults:
    if request.HasField("max_response_bytes"):
        yield from _between("max_response_bytes", request.max_response_bytes, 1, MAX_RESPONSE_BYTES)


def _ref(ref: adapter_pb2.AdapterRef) -> Faults:
    selector = ref.WhichOneof("selector")
    if selector is None:
        yield FieldFault("adapter", "must have a name or an id")
    elif selector == "name":
        yield from _name("adapter.name", ref.name)
    else:
        yield from _id("adapter.id", ref.id)


def _use(field: str, use: adapter_pb2.AdapterUse) -> Faults:
    selector = use.WhichOneof("selector")
    if selector is None:
        yield FieldFault(field, "must have a name, an id, a digest or a source")
    elif selector == "name":
        yield from _name(f"{field}.name", use.name)
    elif selector == "id":
        yield from _id(f"{field}.id", use.id)
    elif selector == "digest":
        yield from _digest(f"{field}.digest", use.digest)
    else:
        yield from _source(f"{field}.source", use.source)
    if use.HasField("scale"):
        yield from _between(f"{field}.scale", use.scale, -MAX_SCALE, MAX_SCALE)
    if use.HasField("expected_digest"):
        yield from _digest(f"{field}.expected_digest", use.expected_digest)


def _source(field: str, source: adapter_pb2.AdapterSource) -> Faults:
    kind = source.WhichOneof("location")
    if kind == "upload":
        yield from _digest(f"{field}.upload", source.upload)
    elif kind == "hub":
        yield from _hub(f"{field}.hub", source.hub)
    elif kind is None or not source.path:
        yield FieldFault(f"{field}.path", "is required")
    elif source.path.startswith((UPLOAD_SCHEME, HUB_SCHEME)):
        yield FieldFault(f"{field}.path", "is not a path; set `upload` or `hub`")
    elif len(source.path) > _MAX_PATH_CHARS or "\0" in source.path:
        yield FieldFault(f"{field}.path", f"must have at most {_MAX_PATH_CHARS} characters, and no NUL")
    if source.HasField("id"):
        yield from _id(f"{field}.id", source.id)
    if source.HasField("name"):
        yield from _name(f"{field}.name", source.name)


def _hub(field: str, hub: adapter_pb2.HubSource) -> Faults:
    if _HUB_REPO.fullmatch(hub.repo_id) is None:
        yield FieldFault(f"{field}.repo_id", "must be OWNER/NAME, each of at most 96 characters of [A-Za-z0-9._-]")
    if hub.revision and _HUB_REVISION.fullmatch(hub.revision) is None:
        yield FieldFault(f"{field}.revision", "must be a branch, tag or commit of at most 200 characters")
    if hub.file and (fault := _path_fault(hub.file, (".safetensors",))) is not None:
        yield FieldFault(f"{field}.file", fault)


def _path_fault(path: str, suffixes: tuple[str, ...], max_parts: int = 16) -> str | None:
    """Says why *path* cannot be that of a file below a folder; None if it can."""
    if not path.endswith(suffixes):
        return f"{path[:_SHOWN_CHARS]!r} must end in {' or '.join(suffixes)}"
    parts = path.split("/")
    if len(path) > _MAX_FILE_PATH_CHARS or len(parts) > max_parts:
        return f"must have at most {_MAX_FILE_PATH_CHARS} characters and {max_parts} parts, NAME or FOLDER/NAME"
    faults = (f"{part[:_SHOWN_CHARS]!r} {fault}" for part in parts if (fault := file_name_fault(part)) is not None)
    return next(faults, None)


def _name(field: str, name: str) -> Faults:
    if not is_valid_name(name):
        yield FieldFault(field, NAME_RULE)


def _id(field: str, adapter_id: int) -> Faults:
    if not 1 <= adapter_id <= MAX_ID:
        yield FieldFault(field, "must be from 1 to 2^63-1")


def _digest(field: str, digest: str) -> Faults:
    if not is_valid_digest(digest):
        yield FieldFault(field, "must be 'sha256:' and 64 lower-case hex digits")


def _selector_key(use: adapter_pb2.AdapterUse) -> object:
    selector = use.WhichOneof("selector")
    if selector is None:
        return None
    return selector, use.source.path if selector == "source" else getattr(use, selector)

"""The words of the house as frozen values: what a request asks for and what an image came from.

Pure Python, no transport, no tensors. Everything here is immutable and safe to share between threads.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_server.use_settings import EVERYWHERE, UseSettings

Digest = str
DEFAULT_TENANT = "default"
Tenants = frozenset[str] | None
"""Who may use an adapter; None is everybody."""


def may_use(tenants: Tenants, tenant: str | None) -> bool:
    """Whether *tenant*, or the operator if it is None, may use what is bound to *tenants*."""
    return tenants is None or tenant is None or tenant in tenants


"""Identity of a version: ``sha256:`` and 64 lower-case hex digits."""


DEFAULT_TENANT = "default"
"""Whose requests are that come without a tenant."""


class ImageFormat(enum.Enum):
    """File format of an encoded image."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


class AdapterState(enum.Enum):
    """Where a version of an adapter is."""

    REGISTERED = "registered"
    LOADING = "loading"
    CACHED = "cached"
    RESIDENT = "resident"
    FAILED = "failed"


class PinLevel(enum.Enum):
    """How close to the device a pinned adapter is kept."""

    HOST = "host"
    DEVICE = "device"


class ApplicationWay(enum.Enum):
    """How adapters were applied at the steps of a request."""

    BASE = "base"
    MERGED = "merged"
    SLOTS = "slots"


class GuidanceKind(enum.Enum):
    """What the guidance scale of a request does in a model.

    CLASSIFIER_FREE: away from the negative prompt, for a second row an image. DISTILLED: an input of the network; a
    negative prompt takes `true_cfg_scale`. NONE: the model has no guidance scale; a negative prompt as before.
    """

    CLASSIFIER_FREE = "classifier-free"
    DISTILLED = "distilled"
    NONE = "none"


class ExecutionPath(enum.Enum):
    """How a model's requests are run."""

    STEP_BATCHING = "step-level batching"
    WHOLE_PIPELINE = "whole pipeline, one request at a time"

    @property
    def cost(self) -> str:
        """What the path means to those who wait."""
        if self is ExecutionPath.STEP_BATCHING:
            return (
                "Images of different requests, adapters and timesteps share steps; a request joins between two steps."
            )
        return (
            "A request waits for all before it, its images are drawn one by one, and adapters are merged into the "
            "weights; diffusers' own loop runs, uncompiled. Progress, previews, cancellation and deadlines work."
        )


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter's files are, with the tags its caller wishes.

    Attributes:
        path: Exactly as the client sent it; the stable id depends on every character.
        id: 1 to 2^63-1, or None for the stable id of the path.
        name: A valid name, or None for one made from the folder's name.
    """

    path: str
    id: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ByName:
    """Selects a registered adapter by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class ById:
    """Selects a registered adapter by one of its ids."""

    id: int


@dataclass(frozen=True, slots=True)
class ByDigest:
    """Selects one version, whatever its name."""

    digest: Digest


Selector = ByName | ById | ByDigest | AdapterSource
"""What may select an adapter in a request; a source is loaded on demand."""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter in a request.

    Attributes:
        selector: Which adapter.
        scale: Finite multiplier of its delta, or None for the adapter's default scale.
        expected_digest: If set, the version must have this digest.
        settings: Where and when it acts.
    """

    selector: Selector
    scale: float | None = None
    expected_digest: Digest | None = None
    settings: UseSettings = EVERYWHERE


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter as it is applied: a use that has been resolved to a version."""

    name: str
    id: int
    digest: Digest
    scale: float
    settings: UseSettings = EVERYWHERE


@dataclass(frozen=True, slots=True)
class SkipLayerGuidance:
    """Guidance away from the model without some of its layers (SD3.5-medium's model card).

    Attributes:
        layers: Indices of transformer blocks, each once.
        scale: Strength, 0 to 100.
        start: Fraction of the steps after which it acts, 0 to 1.
        stop: Fraction of the steps before which it ceases to act, start to 1.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2


@dataclass(frozen=True, slots=True)
class GenerationParameters:
    """What to draw, with every default filled in; equal parameters give equal pictures.

    Attributes:
        scheduler: One of `ModelInfo.schedulers`, or None for the model's own.
        true_cfg_scale: Classifier-free guidance beside distilled one, where `ModelInfo.has_true_cfg`; over 1 it acts.
    """

    prompt: str
    negative_prompt: str
    width_px: int
    height_px: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    skip_layer_guidance: SkipLayerGuidance | None = None
    scheduler: str | None = None
    true_cfg_scale: float = 1.0

    @property
    def uses_guidance(self) -> bool:
        """Whether the scale asks for classifier-free guidance; whether a model has it, its family knows."""
        return self.guidance_scale > 1.0

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image: seed + k."""
        return tuple(self.seed + k for k in range(self.num_images))


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request, ready for the engine.

    Attributes:
        request_id: Unique among requests in flight.
        parameters: What to draw.
        adapters: The adapters to apply, each once; the set is a composition, its order is only for show.
        format: File format of the images.
        tenant: Whose queue it waits in.
        deadline_s: `time.monotonic()` after which nobody waits any more, or None.
        progress_interval_steps: Publish progress after every so many steps of the request.
        preview_interval_steps: Publish previews after every so many steps, or None for none.
        traceparent: The W3C trace context that it belongs to, or None. Says nothing of what is drawn.
    """

    request_id: str
    parameters: GenerationParameters
    adapters: tuple[AdapterUse, ...] = ()
    format: ImageFormat = ImageFormat.PNG
    tenant: str = DEFAULT_TENANT
    deadline_s: float | None = None
    progress_interval_steps: int = 1
    preview_interval_steps: int | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that made an image: enough to make it again on the same server. The prompt has its trigger words."""

    model: str
    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width_px: int
    height_px: int
    adapters: tuple[AppliedAdapter, ...]
    software: str
    skip_layer_guidance: SkipLayerGuidance | None = None
    scheduler: str | None = None
    true_cfg_scale: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A finished image: its index in the request, the file, and what made it."""

    index: int
    format: ImageFormat
    data: bytes
    sha256: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class AdapterUsage:
    """How one adapter of a request met the caches.

    Attributes:
        adapter: The adapter as applied.
        state_on_arrival: Where its version was when the request arrived.
        load_time_s: Wait for it to be read, checked and converted; 0 if it was cached.
    """

    adapter: AppliedAdapter
    state_on_arrival: AdapterState
    load_time_s: float


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What a request cost; times in seconds.

    Attributes:
        denoise_time_s: Time of the steps that it took part in; a step shared with others counts in full.
        completed_steps: Steps, summed over its images.
        steps_by_way: Batches that it took part in, by how adapters were applied.
        mean_batch_images: Images, its own and others', in those batches.
    """

    request_id: str
    queue_time_s: float
    adapter_wait_time_s: float
    text_encode_time_s: float
    denoise_time_s: float
    decode_time_s: float
    image_encode_time_s: float
    total_time_s: float
    completed_steps: int
    steps_by_way: Mapping[ApplicationWay, int]
    mean_batch_images: float
    adapters: tuple[AdapterUsage, ...] = ()

    @property
    def way(self) -> ApplicationWay:
        """How adapters were applied at most of the steps."""
        return max(self.steps_by_way, key=lambda way: self.steps_by_way[way], default=ApplicationWay.BASE)


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """The request waits; *position* requests are to start before it."""

    position: int


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Denoising went on; steps are summed over the request's images."""

    completed_steps: int
    total_steps: int
    elapsed_time_s: float


@dataclass(frozen=True, slots=True)
class PreviewEvent:
    """What an unfinished image would look like, as a small JPEG."""

    image_index: int
    completed_steps: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """An image is finished."""

    image: EncodedImage


@dataclass(frozen=True, slots=True)
class StatsEvent:
    """The request is complete; always the last event of one that succeeds."""

    stats: GenerationStats


GenerationEvent = QueuedEvent | ProgressEvent | PreviewEvent | ImageEvent | StatsEvent
"""What a running request tells, in order; a failure is raised in place of an event."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a request that says nothing gets from this model."""

    width_px: int
    height_px: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the server says of its model.

    Attributes:
        size_multiple_px: Width and height must be multiples of this many pixels.
        max_side_px: The largest width or height that the model can position.
        adaptable_components: Components that adapters may change, sorted.
        num_skippable_layers: Blocks that skip-layer guidance may name; 0 if the model has none.
        schedulers: Schedulers that a request may name in place of the model's own.
        guidance: What the guidance scale does.
        execution: How requests are run.
        negative_prompts: Whether the model can take a negative prompt at all.
    """

    name: str
    family: str
    pipeline_class: str
    device: str
    dtype: str
    defaults: ModelDefaults
    size_multiple_px: int
    max_side_px: int
    adaptable_components: tuple[str, ...] = field(default=())
    num_skippable_layers: int = 0
    schedulers: tuple[str, ...] = ()
    guidance: GuidanceKind = GuidanceKind.CLASSIFIER_FREE
    execution: ExecutionPath = ExecutionPath.STEP_BATCHING
    negative_prompts: bool = True

    @property
    def has_true_cfg(self) -> bool:
        """Whether requests may ask for `true_cfg_scale`: where guidance_scale is not classifier-free guidance."""
        return self.guidance is not GuidanceKind.CLASSIFIER_FREE


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """What a version adapts in one component of the pipeline."""

    name: str
    num_modules: int
    min_rank: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class PinInfo:
    """An operator's pin; *expire_time_s* is Unix time, or None for no end."""

    level: PinLevel
    expire_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A snapshot of one version; times are Unix times in seconds."""

    digest: Digest
    size_bytes: int
    rank: int
    components: tuple[ComponentSummary, ...]
    state: AdapterState
    load_time_s: float | None
    last_use_time_s: float | None
    failure: str = ""
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of a registered adapter; versions are the most recently loaded first."""

    name: str
    ids: tuple[int, ...]
    source: AdapterSource
    versions: tuple[VersionInfo, ...]
    current_digest: Digest
    pin: PinInfo | None
    default_scale: float
    tenants: Tenants = None


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """The adapter cache at one moment; counters run since the start."""

    budget_bytes: int
    used_bytes: int
    pinned_bytes: int
    max_adapters: int
    cached_adapters: int
    device_slots: int
    resident_adapters: int
    hits: int
    misses: int
    evictions: int
    max_pinned_bytes: int = 0
    pinned_adapters: int = 0
    device_pinned_adapters: int = 0
    leases: int = 0
    device_hits: int = 0
    device_misses: int = 0
    device_evictions: int = 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of a device at one moment, in bytes.

    Attributes:
        total_bytes, free_bytes: Of the device, whoever uses it.
        allocated_bytes, reserved_bytes: In tensors of this process, and kept by its allocator, those included.
    """

    total_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine has done since its start.

    Attributes:
        steps_by_way: Batches, by how adapters were applied.
        image_steps: Images in those batches, summed.
        switches: Changes of the merged weights.
        page_writes: Adapters written into pages.
        compiles, captures: Graphs made by the compiler, and CUDA graphs.
        prompt_hits, prompt_misses: Prompts found in the cache of embeddings, and encoded.
        finished_requests, failed_requests: Requests that got their images, and those that ended otherwise.
        finished_images: Images made.
        active_images: Images that are being denoised now.
        restarts: Times that the engine died and began anew.
        prompt_evictions, prompt_bytes, prompt_budget_bytes: The cache of embeddings.
        device_adapter_bytes: Weights of adapters that lie on the device.
        device_memory: The device's memory; None on the CPU.
    """

    steps_by_way: Mapping[ApplicationWay, int]
    image_steps: int
    switches: int
    page_writes: int
    compiles: int
    captures: int
    prompt_hits: int
    prompt_misses: int
    finished_requests: int = 0
    failed_requests: int = 0
    finished_images: int = 0
    active_images: int = 0
    restarts: int = 0
    prompt_evictions: int = 0
    prompt_bytes: int = 0
    prompt_budget_bytes: int = 0
    device_adapter_bytes: int = 0
    device_memory: DeviceMemory | None = None


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """The queue of requests at one moment.

    Attributes:
        max_queued_per_tenant: Requests of one tenant that may wait.
        waiting_tenants: Tenants that have requests waiting.
        estimated_wait_s: When all work that is accepted should be done, by the measured rate; None before the first
            step.
    """

    queued_requests: int
    running_requests: int
    max_queued_requests: int
    max_queued_per_tenant: int = 0
    waiting_tenants: int = 0
    estimated_wait_s: float | None = None

"""What the model, the cache, the engine and the queue say of themselves.

Pure Python, no transport, no tensors; frozen values, safe to share between threads.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_server.types.generation import ApplicationWay


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
        guidance_threshold: The guidance scale over which classifier-free guidance, and with it a negative prompt, acts;
            None if that is not known.
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
    guidance_threshold: float | None = 1.0

    @property
    def has_true_cfg(self) -> bool:
        """Whether requests may ask for `true_cfg_scale`: where guidance_scale is not classifier-free guidance."""
        return self.guidance is not GuidanceKind.CLASSIFIER_FREE


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
    unsaved_adapters: int = 0


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
        unread_bytes: Bytes of images that are made and not taken by their callers.
        max_unread_bytes: The most of them.
        retained_bytes: Bytes of results that are kept for retries.
    """

    queued_requests: int
    running_requests: int
    max_queued_requests: int
    max_queued_per_tenant: int = 0
    waiting_tenants: int = 0
    estimated_wait_s: float | None = None
    unread_bytes: int = 0
    max_unread_bytes: int = 0
    retained_bytes: int = 0

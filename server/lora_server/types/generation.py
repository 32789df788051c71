"""What a request asks for, what an image came from, and what happens in between.

Pure Python, no transport, no tensors; frozen values, safe to share between threads.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from lora_server.types.adapters import DEFAULT_TENANT, AdapterState, AdapterUse, AppliedAdapter


class ImageFormat(enum.Enum):
    """File format of an encoded image."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


class ApplicationWay(enum.Enum):
    """How adapters were applied at the steps of a request."""

    BASE = "base"
    MERGED = "merged"
    SLOTS = "slots"


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


MAX_DROPPED_CHARS = 200
"""So much is told of what was cut off a prompt."""


@dataclass(frozen=True, slots=True)
class PromptTruncation:
    """What one tokenizer cut off a prompt.

    Attributes:
        encoder: The component whose tokenizer did.
        max_tokens, num_tokens: What the encoder reads and what the prompt has, the tokenizer's own tokens included.
        dropped_text: The beginning of what was cut off.
        negative: Whether it is the negative prompt.
    """

    encoder: str
    max_tokens: int
    num_tokens: int
    dropped_text: str
    negative: bool = False


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
    prompt_truncations: tuple[PromptTruncation, ...] = ()


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
        prompt_truncations: What tokenizers cut off its prompts.
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
    prompt_truncations: tuple[PromptTruncation, ...] = ()

    @property
    def way(self) -> ApplicationWay:
        """How adapters were applied at most of the steps."""
        return max(self.steps_by_way, key=lambda way: self.steps_by_way[way], default=ApplicationWay.BASE)


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """The request waits; *position* requests are to start before it.

    *expected_s* after its acceptance it should be done; None if nothing was measured yet.
    """

    position: int
    expected_s: float | None = None


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

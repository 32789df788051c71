"""What a request gives: images, where they came from, and what happened. Frozen values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_client.types.requests import SkipLayerGuidance


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """An adapter as it was applied: its scale, and where and when it acted, as in `AdapterUse`."""

    name: str
    id: int
    digest: str
    scale: float
    component_scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    block_scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    start: float = 0.0
    end: float = 1.0
    use_trigger_words: bool = False


@dataclass(frozen=True, slots=True)
class PromptTruncation:
    """What one tokenizer cut off a prompt: the images do not know of it.

    Attributes:
        encoder: The text encoder that reads less than the prompt has.
        max_tokens, num_tokens: What it reads, and what the prompt has.
        dropped_text: What was cut off, at most its first 200 characters.
        negative: Whether it is the negative prompt.
    """

    encoder: str
    max_tokens: int
    num_tokens: int
    dropped_text: str
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that made an image; the prompt has its trigger words."""

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
class Image:
    """A finished image: its file, and what made it."""

    index: int
    format: str
    data: bytes = field(repr=False)
    provenance: Provenance

    @property
    def seed(self) -> int:
        """The seed that makes it again."""
        return self.provenance.seed

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file as it came, in one piece (temporary name, then rename); returns its path.

        Raises:
            OSError: If it cannot be written; nothing is left behind.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self.data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


@dataclass(frozen=True, slots=True)
class AdapterUsage:
    """How an adapter met the caches: its state on arrival, and how long the request waited for it."""

    adapter: AppliedAdapter
    state_on_arrival: str
    load_time_s: float


@dataclass(frozen=True, slots=True)
class Stats:
    """What a request cost; times in seconds.

    Attributes:
        denoise_time_s: Time of its steps; one that was shared with other requests counts in full.
        way: How adapters were applied at most of the steps: `base`, `merged` or `slots`.
        steps_by_way: Batches that it took part in, by way.
        mean_batch_images: Images in those batches, those of other requests too.
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
    way: str
    steps_by_way: dict[str, int]
    mean_batch_images: float
    adapters: tuple[AdapterUsage, ...]
    prompt_truncations: tuple[PromptTruncation, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; *position* requests are to start before it.

    *expected_time_s* after its acceptance its images should be there, as the server estimates; None if it cannot yet.
    """

    request_id: str
    position: int
    seed: int
    expected_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoising went on; steps are summed over the request's images."""

    completed_steps: int
    total_steps: int
    elapsed_time_s: float


@dataclass(frozen=True, slots=True)
class Preview:
    """What an unfinished image would look like: a small JPEG."""

    image_index: int
    completed_steps: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageReady:
    """An image is complete and verified."""

    image: Image


@dataclass(frozen=True, slots=True)
class Completed:
    """The request is done; always the last event."""

    stats: Stats


Event = Queued | Progress | Preview | ImageReady | Completed
"""What `stream_generate` yields."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The images of a request, by index, and what they cost."""

    request_id: str
    images: tuple[Image, ...]
    stats: Stats

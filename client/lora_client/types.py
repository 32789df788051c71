"""What the client takes and gives: frozen values, never messages of the wire."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SCALE = re.compile(_NUMBER)
_SETTING = rf"(?:trigger|[A-Za-z0-9_.*?-]+={_NUMBER})"
_WITH_SETTINGS = re.compile(rf"(.*?)((?:,{_SETTING})+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a request: exactly one of *name*, *id*, *digest* and *path*.

    Attributes:
        name: A registered name.
        id: A registered id; with *path*, the id to register the path under.
        digest: `sha256:` and 64 hex digits of a registered version.
        path: A folder on the server, loaded on demand.
        scale: Multiplier of the adapter's delta, -100 to 100; None for the adapter's default.
        expected_digest: If set, the request fails unless the adapter has this digest.
        component_scales: Factors on the scale by component of the pipeline, such as `{"text_encoder": 0.5}`.
        block_scales: Factors on the scale by modules of the denoiser, such as `{"transformer_blocks.0": 0}`: the
            beginning of a module's path, each part a name or a glob; that with the most parts counts.
        start, end: Fractions of the steps between which the adapter changes the denoiser; None is 0 and 1.
        use_trigger_words: Puts the adapter's trigger words in front of the prompt.
    """

    name: str | None = None
    id: int | None = None
    digest: str | None = None
    path: str | None = None
    scale: float | None = None
    expected_digest: str | None = None
    component_scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    block_scales: Mapping[str, float] = field(default_factory=dict, hash=False)
    start: float | None = None
    end: float | None = None
    use_trigger_words: bool = False

    def __post_init__(self) -> None:
        selectors = [self.name, self.digest, self.path]
        given = sum(selector is not None for selector in selectors)
        if given + (self.id is not None and self.path is None) != 1:
            raise ValueError("an AdapterUse needs exactly one of name, id, digest and path")

    @classmethod
    def parse(cls, text: str) -> AdapterUse:
        """Reads `NAME[@sha256:HEX][:SCALE]`, `sha256:HEX[:SCALE]` or `PATH[:SCALE]`; a path begins with / ./ ../ or ~.

        A relative path is made absolute against the working directory, and ~ is expanded. Settings may follow, each
        after a comma: `COMPONENT=FACTOR`, `BLOCK.PATTERN=FACTOR` (a dot makes it one of the denoiser's blocks, also in
        front: `.proj_out=0`), `start=FRACTION`, `end=FRACTION` and `trigger`.

        Raises:
            ValueError: If it is none of these.
        """
        with_settings = _WITH_SETTINGS.fullmatch(text)
        if with_settings is not None:
            return replace(cls.parse(with_settings[1]), **_settings(with_settings[2][1:].split(",")))
        if text.startswith(("/", "./", "../", "~")):
            path, scale = _split_scale(text)
            return cls(path=os.path.abspath(os.path.expanduser(path)), scale=scale)
        if text.startswith("sha256:"):
            digest, scale = text[:71], None
            if len(text) > 71:
                rest, scale = _split_scale("x" + text[71:])
                if rest != "x":
                    raise ValueError(f"{text!r} is not a digest with a scale")
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"{digest!r} is not 'sha256:' and 64 lower-case hex digits")
            return cls(digest=digest, scale=scale)
        name, at, rest = text.partition("@")
        if not at:
            name, scale = _split_scale(text)
            return cls(name=_checked_name(name), scale=scale)
        pinned = cls.parse(rest)
        if pinned.digest is None:
            raise ValueError(f"{rest!r} after @ is not a digest")
        return cls(name=_checked_name(name), scale=pinned.scale, expected_digest=pinned.digest)


def _split_scale(text: str) -> tuple[str, float | None]:
    head, colon, tail = text.rpartition(":")
    if colon and _SCALE.fullmatch(tail):
        return head, float(tail)
    return text, None


def _checked_name(name: str) -> str:
    if not name:
        raise ValueError("the name of the adapter is missing")
    if "," in name:
        what = "COMPONENT=FACTOR, BLOCK.PATTERN=FACTOR, start=FRACTION, end=FRACTION and trigger"
        raise ValueError(f"{name.partition(',')[2]!r} is no setting of an adapter; there are {what}")
    return name


def _settings(parts: list[str]) -> dict[str, Any]:
    """The fields of an AdapterUse that settings such as `text_encoder=0.5` stand for."""
    components: dict[str, float] = {}
    blocks: dict[str, float] = {}
    found: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        target = blocks if "." in key else components
        if key == "trigger" and not value:
            key, target = "use_trigger_words", found
        elif key in ("start", "end"):
            target = found
        key = key.removeprefix(".")
        if key in target:
            raise ValueError(f"{part!r} is there twice")
        target[key] = float(value) if value else True
    return {"component_scales": components, "block_scales": blocks, **found}


@dataclass(frozen=True, slots=True)
class SkipLayerGuidance:
    """Guidance away from the model without some of its layers; None takes the server's default."""

    layers: tuple[int, ...]
    scale: float | None = None
    start: float | None = None
    stop: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to draw; None takes the model's own default, which `server_info` reports.

    Attributes:
        negative_prompt: What to avoid.
        width_px, height_px: Size in pixels.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; what it does depends on the model, see `server_info`. Classifier-free: 1 or less
            turns it off.
        num_images: How many; image k has seed + k.
        format: `png`, `webp` or `jpeg`.
        skip_layer_guidance: For models that have it.
        scheduler: One of the server's `schedulers`; None for the model's own.
        progress_interval_steps: Progress events after every so many steps.
        preview_interval_steps: Preview events after every so many steps; None for none.
        request_id: For idempotency; None draws one.
        true_cfg_scale: Guidance away from the negative prompt, for models whose own guidance is distilled (FLUX.1).
    """

    negative_prompt: str = ""
    width_px: int | None = None
    height_px: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images: int = 1
    format: str = "png"
    skip_layer_guidance: SkipLayerGuidance | None = None
    scheduler: str | None = None
    progress_interval_steps: int = 1
    preview_interval_steps: int | None = None
    request_id: str | None = None
    true_cfg_scale: float | None = None


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


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; *position* requests are to start before it."""

    request_id: str
    position: int
    seed: int


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


@dataclass(frozen=True, slots=True)
class Component:
    """What a version adapts in one component of the pipeline."""

    name: str
    num_modules: int
    min_rank: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an adapter's weights; *state* is registered, loading, cached, resident or failed."""

    digest: str
    size_bytes: int
    rank: int
    components: tuple[Component, ...]
    state: str
    load_time: datetime | None
    last_use_time: datetime | None
    failure: str
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator's pin: *level* is host or device; *expire_time* None has no end."""

    level: str
    expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered adapter; versions are the most recently loaded first."""

    name: str
    ids: tuple[int, ...]
    path: str
    versions: tuple[Version, ...]
    current_digest: str
    pin: Pin | None
    default_scale: float
    tenants: tuple[str, ...] | None = None
    """The only tenants that may use it; None is everybody."""

    @property
    def current(self) -> Version:
        """The version that new requests get."""
        return next(version for version in self.versions if version.digest == self.current_digest)


@dataclass(frozen=True, slots=True)
class AdapterUseCount:
    """How often an adapter was used since the server's start; *state* is `unspecified` if it was unloaded since."""

    name: str
    uses: int
    state: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class ServerWatch:
    """What the server does at one moment; counters run since its start. Sections are as in `ServerInfo`."""

    time: datetime
    start_time: datetime
    model: str
    queue: dict[str, object]
    cache: dict[str, object]
    engine: dict[str, object]
    adapters: tuple[AdapterUseCount, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is; each section maps the contract's field names to values."""

    version: str
    start_time: datetime
    model: dict[str, object]
    limits: dict[str, object]
    cache: dict[str, object]
    queue: dict[str, object]
    engine: dict[str, object]
    retention_time: timedelta

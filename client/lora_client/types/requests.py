"""What the client asks for: adapters as people write them, and options. Frozen values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_client.types.use_text import use_fields


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

        What begins with `hub://` is a source on the Hugging Face hub: `hub://OWNER/NAME[/FILE][@REVISION][:SCALE]`.

        A relative path is made absolute against the working directory, and ~ is expanded. Settings may follow, each
        after a comma: `COMPONENT=FACTOR`, `BLOCK.PATTERN=FACTOR` (a dot makes it one of the denoiser's blocks, also in
        front: `.proj_out=0`), `start=FRACTION`, `end=FRACTION` and `trigger`.

        Raises:
            ValueError: If it is none of these.
        """
        return cls(**use_fields(text))


AdapterLike = AdapterUse | str | tuple[str | AdapterUse, float] | list[Any] | Mapping[Any, Any]
"""One adapter, or a mapping of several: a text as `AdapterUse.parse` reads it, a pair of one and its scale, a mapping
of such texts to scales, or a dictionary of `AdapterUse`'s fields, also by the names that other APIs have for them."""

AdaptersLike = AdapterLike | Sequence[AdapterLike] | Iterator[AdapterLike]
"""What `adapters=` takes; see `lora_client._uses.parse_uses`."""


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

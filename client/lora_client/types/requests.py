"""What the client asks for: adapters as people write them, and options. Frozen values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

        What begins with `hub://` is a source on the Hugging Face hub: `hub://OWNER/NAME[/FILE][@REVISION][:SCALE]`.

        A relative path is made absolute against the working directory, and ~ is expanded. Settings may follow, each
        after a comma: `COMPONENT=FACTOR`, `BLOCK.PATTERN=FACTOR` (a dot makes it one of the denoiser's blocks, also in
        front: `.proj_out=0`), `start=FRACTION`, `end=FRACTION` and `trigger`.

        Raises:
            ValueError: If it is none of these.
        """
        with_settings = _WITH_SETTINGS.fullmatch(text)
        if with_settings is not None:
            return replace(cls.parse(with_settings[1]), **_settings(with_settings[2][1:].split(",")))
        if text.startswith("hub://"):
            path, scale = _split_scale(text)
            return cls(path=path, scale=scale)
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

"""Pixels to files: PNG, WebP or JPEG with the provenance inside.

Pure functions of their arguments, run on worker threads. The layout of the metadata is a contract with `lora-client
show`: PNG has a text chunk `lora-inference`; WebP and JPEG have `lora-inference:` and the same JSON in the EXIF tag
ImageDescription.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from lora_server.types import AppliedAdapter, EncodedImage, ImageFormat, Provenance

METADATA_KEY = "lora-inference"
_SCHEMA = 1
_EXIF_IMAGE_DESCRIPTION = 0x010E
_JPEG_QUALITY = 95
# A JPEG segment holds 65,533 bytes; what is left over is for the EXIF directory around the text.
_MAX_JPEG_METADATA_BYTES = 65_000
_PREVIEW_QUALITY = 75
# Level 1 costs a third of the time of level 6 for about a tenth more bytes on generated pictures.
_PNG_LEVEL = 1


def encode_image(
    index: int,
    pixels: NDArray[np.uint8],
    image_format: ImageFormat,
    provenance: Provenance,
    *,
    prompt_metadata: bool,
) -> EncodedImage:
    """Encodes pixels, (height_px, width_px, 3), with their provenance inside.

    The prompts are left out of the file without *prompt_metadata*, and in a JPEG where they exceed what its metadata
    can hold (several thousand characters outside ASCII).
    """
    metadata = metadata_json(provenance, prompt_metadata=prompt_metadata)
    if image_format is ImageFormat.JPEG and len(metadata) > _MAX_JPEG_METADATA_BYTES:
        metadata = metadata_json(provenance, prompt_metadata=False)
    data = _encode(Image.fromarray(pixels), image_format, metadata)
    return EncodedImage(index, image_format, data, hashlib.sha256(data).hexdigest(), provenance)


def encode_preview(pixels: NDArray[np.uint8]) -> bytes:
    """Encodes the pixels of a preview, (height_px, width_px, 3), as a JPEG without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_PREVIEW_QUALITY)
    return buffer.getvalue()


def metadata_json(provenance: Provenance, *, prompt_metadata: bool) -> str:
    """Returns the provenance as one line of ASCII JSON, without what is not set."""
    fields: dict[str, Any] = {"schema": _SCHEMA, **asdict(provenance)}
    fields["adapters"] = [_adapter_fields(adapter) for adapter in provenance.adapters]
    if not prompt_metadata:
        del fields["prompt"], fields["negative_prompt"]
        for truncation in fields["prompt_truncations"]:
            del truncation["dropped_text"]
    for name in ("skip_layer_guidance", "scheduler", "true_cfg_scale"):
        if fields[name] is None:
            del fields[name]
    if not fields["prompt_truncations"]:
        del fields["prompt_truncations"]
    return json.dumps(fields)


def _adapter_fields(adapter: AppliedAdapter) -> dict[str, Any]:
    """An adapter in the metadata; its settings only where they are set."""
    settings = adapter.settings
    fields: dict[str, Any] = {
        "name": adapter.name,
        "id": adapter.id,
        "digest": adapter.digest,
        "scale": adapter.scale,
        "component_scales": [list(each) for each in settings.component_scales],
        "block_scales": [list(each) for each in settings.block_scales],
        "schedule": {"start": settings.start, "end": settings.end} if settings.scheduled else None,
        "use_trigger_words": settings.use_trigger_words,
    }
    always = ("name", "id", "digest", "scale")
    return {key: value for key, value in fields.items() if key in always or value}


def _encode(image: Image.Image, image_format: ImageFormat, metadata: str) -> bytes:
    buffer = io.BytesIO()
    if image_format is ImageFormat.PNG:
        text = PngImagePlugin.PngInfo()
        text.add_text(METADATA_KEY, metadata)
        image.save(buffer, "PNG", pnginfo=text, compress_level=_PNG_LEVEL)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = f"{METADATA_KEY}:{metadata}"
    if image_format is ImageFormat.WEBP:
        image.save(buffer, "WEBP", lossless=True, quality=0, method=1, exif=exif.tobytes())
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, exif=exif.tobytes())
    return buffer.getvalue()

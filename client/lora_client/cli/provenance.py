"""Reads the provenance inside an image file, which may come from anybody."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lora_client.cli.remake import arguments

METADATA_KEY = "lora-inference"
_EXIF_IMAGE_DESCRIPTION = 0x010E
_MAX_METADATA_CHARS = 1_000_000
_FORMATS = ("PNG", "WEBP", "JPEG")
_SCHEMA = 1


def read_provenance(file: Path) -> dict[str, Any]:
    """Reads the provenance of an image file; every field that a command line is made of has its type and range.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no image, or not one of this service.
    """
    with open(file, "rb") as stream:
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is not an image that can be read")
        text = _metadata(file, stream)
    if text is None:
        raise ValueError(f"{str(file)!r} has no provenance of lora-inference in it")
    try:
        return _parsed(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the provenance in {str(file)!r} is broken: {str(error)[:200]}") from error


def _metadata(file: Path, stream: BinaryIO) -> str | None:
    """The text that the service writes into files; without decoding pixels where it stands before them."""
    try:
        with _no_warnings(), Image.open(stream, formats=_FORMATS) as image:
            if image.format == "PNG":
                text = image.info.get(METADATA_KEY) or getattr(image, "text", {}).get(METADATA_KEY)
                return None if text is None else str(text)
            description = image.getexif().get(_EXIF_IMAGE_DESCRIPTION)
    except Exception as error:  # Pillow raises what its readers stumble on, of no closed list of types
        raise ValueError(f"{str(file)!r} is not an image that can be read") from error
    prefix = f"{METADATA_KEY}:"
    if not isinstance(description, str) or not description.startswith(prefix):
        return None
    return description.removeprefix(prefix)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow warns on standard error of what is odd in a file; what may be a bomb is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _parsed(text: str) -> dict[str, Any]:
    if len(text) > _MAX_METADATA_CHARS:
        raise ValueError(f"it has over {_MAX_METADATA_CHARS} characters")
    provenance = json.loads(text, parse_float=_finite, parse_constant=_finite)
    if not isinstance(provenance, dict):
        raise TypeError("it is no JSON object")
    if provenance.get("schema", _SCHEMA) != _SCHEMA:
        raise ValueError("it is of another schema than this lora-client knows")
    arguments(provenance)
    json.dumps(provenance, indent=2)  # what cannot be printed is refused here: its nesting is too deep
    return provenance


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number

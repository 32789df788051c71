"""`lora-client show`: the provenance inside a file, and the command line that makes the picture again."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, UnidentifiedImageError

from lora_client.cli.common import print_json, print_line
from lora_client.cli.progress import truncation_text
from lora_client.types import PromptTruncation

METADATA_KEY = "lora-inference"
_EXIF_IMAGE_DESCRIPTION = 0x010E
_MAX_METADATA_CHARS = 1_000_000


def show(
    file: Annotated[Path, typer.Argument(help="A PNG, WebP or JPEG that the service made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints what made a picture, and the command line that makes it again."""
    provenance = read_provenance(file)
    if as_json:
        print_json({"provenance": provenance, "command": command_line(provenance)})
        return
    for key, value in provenance.items():
        if key == "adapters":
            for adapter in value:
                print_line(f"{'adapter':<20} {_use_text(adapter, trigger=True)}")
        elif key == "prompt_truncations":
            for truncation in _truncations(value):
                print_line(f"{'warning':<20} {truncation_text(truncation)}")
        else:
            print_line(f"{key:<20} {value}")
    print_line(f"\n{command_line(provenance)}")


def _truncations(value: object) -> Iterator[PromptTruncation]:
    """What a file says was cut off its prompts, as far as it has the form; the texts may be left out."""
    for each in value if isinstance(value, list) else []:
        fields = {"dropped_text": "(not in the file)", "negative": False, **(each if isinstance(each, dict) else {})}
        kinds = {"encoder": str, "max_tokens": int, "num_tokens": int, "dropped_text": str, "negative": bool}
        if all(isinstance(fields.get(name), kind) for name, kind in kinds.items()):
            yield PromptTruncation(**{name: fields[name] for name in kinds})


def read_provenance(file: Path) -> dict[str, Any]:
    """Reads the provenance of an image file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no image, or not one of this service.
    """
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            text = getattr(image, "text", {}).get(METADATA_KEY) if image.format == "PNG" else None
            description = image.getexif().get(_EXIF_IMAGE_DESCRIPTION)
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{file} is not an image that can be read") from error
    if text is None and isinstance(description, str) and description.startswith(f"{METADATA_KEY}:"):
        text = description.removeprefix(f"{METADATA_KEY}:")
    if text is None:
        raise ValueError(f"{file} has no provenance of lora-inference in it")
    return _parse(file, text)


def _parse(file: Path, text: str) -> dict[str, Any]:
    required = {"seed": int, "adapters": list, "width_px": int, "height_px": int, "num_inference_steps": int}
    try:
        if len(text) > _MAX_METADATA_CHARS:
            raise ValueError("too long")
        provenance = json.loads(text)
        if not all(isinstance(provenance[key], kind) for key, kind in required.items()):
            raise TypeError("a field has the wrong type")
        for adapter in provenance["adapters"]:
            _use_text(adapter, trigger=True)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the provenance in {file} is broken") from error
    result: dict[str, Any] = provenance
    return result


def command_line(provenance: dict[str, Any]) -> str:
    """Returns the command that makes the picture again; without its prompt if the file does not tell it."""
    words = ["lora-client", "generate", "--prompt", str(provenance.get("prompt", "PROMPT (not in the file)"))]
    if provenance.get("negative_prompt"):
        words += ["--negative-prompt", str(provenance["negative_prompt"])]
    words += ["--seed", str(provenance["seed"])]
    words += ["--width", str(provenance["width_px"]), "--height", str(provenance["height_px"])]
    words += ["--num-inference-steps", str(provenance["num_inference_steps"])]
    words += ["--guidance-scale", f"{provenance.get('guidance_scale', 1.0):g}"]
    if isinstance(provenance.get("true_cfg_scale"), int | float):
        words += ["--true-cfg-scale", f"{provenance['true_cfg_scale']:g}"]
    guidance = provenance.get("skip_layer_guidance")
    if isinstance(guidance, dict):
        words += ["--skip-layers", ",".join(map(str, guidance["layers"]))]
    if isinstance(provenance.get("scheduler"), str):
        words += ["--scheduler", provenance["scheduler"]]
    for adapter in provenance["adapters"]:
        # A prompt that is in the file has its trigger words already.
        words += ["--lora", _use_text(adapter, trigger="prompt" not in provenance)]
    return shlex.join(words)


def _use_text(adapter: dict[str, Any], *, trigger: bool) -> str:
    """One adapter of the provenance as `AdapterUse.parse` reads it; *trigger* asks for trigger words if it did."""
    parts = [f"{adapter['name']}@{adapter['digest']}:{_number(adapter['scale'])}"]
    parts += [f"{component}={_number(factor)}" for component, factor in adapter.get("component_scales", ())]
    for pattern, factor in adapter.get("block_scales", ()):
        parts.append(f"{pattern if '.' in pattern else f'.{pattern}'}={_number(factor)}")
    schedule = adapter.get("schedule")
    if schedule is not None:
        parts += [f"start={_number(schedule['start'])}", f"end={_number(schedule['end'])}"]
    if trigger and adapter.get("use_trigger_words"):
        parts.append("trigger")
    return ",".join(parts)


def _number(value: float) -> str:
    """The number, whole: six digits only where they are enough."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))

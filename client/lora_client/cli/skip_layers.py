"""Skip-layer guidance as text: `7,8,9`, or with all of its numbers `7,8,9:2.8,start=0.01,stop=0.2`."""

from __future__ import annotations

import math

from lora_client.types import SkipLayerGuidance


def parse_skip_layers(text: str) -> SkipLayerGuidance | None:
    """Reads `LAYER[,LAYER...][:SCALE][,start=FRACTION][,stop=FRACTION]`; None if it is empty.

    Raises:
        ValueError: If it is anything else.
    """
    if not text:
        return None
    layers: list[int] = []
    settings: dict[str, float] = {}
    try:
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if equals:
                if key not in ("start", "stop") or key in settings:
                    raise ValueError(key)
                settings[key] = _finite(value)
                continue
            layer, colon, scale = part.partition(":")
            if settings or not (layer.isascii() and layer.isdigit()):
                raise ValueError(part)
            layers.append(int(layer))
            if colon:
                settings["scale"] = _finite(scale)
    except ValueError:
        what = "block numbers such as 7,8,9, perhaps with :SCALE, start=FRACTION and stop=FRACTION behind them"
        raise ValueError(f"--skip-layers: {text!r} is not a list of {what}") from None
    return SkipLayerGuidance(tuple(layers), **settings)


def skip_layers_text(guidance: SkipLayerGuidance) -> str:
    """Returns *guidance* as `parse_skip_layers` reads it."""
    text = ",".join(map(str, guidance.layers))
    if guidance.scale is not None:
        text += f":{guidance.scale!r}"
    for key, value in (("start", guidance.start), ("stop", guidance.stop)):
        if value is not None:
            text += f",{key}={value!r}"
    return text


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number

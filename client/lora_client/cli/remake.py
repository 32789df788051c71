"""Provenance to the command that makes the picture again.

The provenance may be a stranger's. Its texts become arguments (`--prompt=TEXT`), never options; no server, token or
file is named; and what the command line would read differently is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from lora_client._fields import real, text, whole
from lora_client.cli.skip_layers import skip_layers_text
from lora_client.console import can_print
from lora_client.types import AdapterUse, SkipLayerGuidance

_MAX_UINT32, _MAX_INT64 = 2**32 - 1, 2**63 - 1
_SIZES = {"--width": "width_px", "--height": "height_px", "--num-inference-steps": "num_inference_steps"}
_NO_PROMPT = "PROMPT (not in the file)"


def command_line(provenance: Mapping[str, Any]) -> str | None:
    """Returns the command that makes the picture again, quoted for a shell; None if it cannot be printed as it is.

    Line breaks and controls would drive the terminal, or look like other lines, and are lost when they are escaped.

    Raises:
        TypeError, ValueError: If a field is not of its type or range.
    """
    command = shlex.join(["lora-client", *arguments(provenance)])
    return command if can_print(command) else None


def arguments(provenance: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of `lora-client` that make the picture again; without its prompt if the file has none.

    Raises:
        TypeError, ValueError: If a field is not of its type or range; names it.
    """
    given = provenance.get
    words = ["generate", f"--prompt={text('prompt', given('prompt', _NO_PROMPT))}"]
    if given("negative_prompt") is not None and text("negative_prompt", given("negative_prompt")):
        words.append(f"--negative-prompt={given('negative_prompt')}")
    words += ["--seed", str(whole("seed", given("seed"), _MAX_INT64))]
    for option, field in _SIZES.items():
        words += [option, str(whole(field, given(field), _MAX_UINT32))]
    words += ["--guidance-scale", _number("guidance_scale", given("guidance_scale", 1.0))]
    if given("true_cfg_scale") is not None:
        words += ["--true-cfg-scale", _number("true_cfg_scale", given("true_cfg_scale"))]
    if given("skip_layer_guidance") is not None:
        words += ["--skip-layers", skip_layers_text(_guidance(given("skip_layer_guidance")))]
    if given("scheduler") is not None:
        words.append(f"--scheduler={text('scheduler', given('scheduler'))}")
    for use in uses(provenance):
        # A prompt that is in the file has its trigger words already.
        words += ["--lora", use_text(use, trigger="prompt" not in provenance)]
    return words


def uses(provenance: Mapping[str, Any]) -> list[AdapterUse]:
    """Returns the adapters of the picture; TypeError or ValueError as `arguments`."""
    adapters = provenance.get("adapters")
    if not isinstance(adapters, list):
        raise TypeError("adapters: is no list")
    return [_use(f"adapters[{k}]", each) for k, each in enumerate(adapters)]


def use_text(use: AdapterUse, *, trigger: bool) -> str:
    """Returns *use* as `AdapterUse.parse` reads it; *trigger* asks for trigger words if it did."""
    selector = f"{use.name}@{use.expected_digest}" if use.name else str(use.digest)
    parts = [f"{selector}:{_number('scale', use.scale)}"]
    parts += [f"{component}={_number(component, factor)}" for component, factor in use.component_scales.items()]
    for pattern, factor in use.block_scales.items():
        parts.append(f"{pattern if '.' in pattern else f'.{pattern}'}={_number(pattern, factor)}")
    if use.start is not None and use.end is not None:
        parts += [f"start={_number('start', use.start)}", f"end={_number('end', use.end)}"]
    if trigger and use.use_trigger_words:
        parts.append("trigger")
    return ",".join(parts)


def _use(where: str, adapter: object) -> AdapterUse:
    """The use that a file's adapter describes; refused if its text would be read as another."""
    if not isinstance(adapter, dict):
        raise TypeError(f"{where}: is no object")
    name = text(f"{where}.name", adapter.get("name", ""))
    digest = text(f"{where}.digest", adapter.get("digest"))
    schedule = adapter.get("schedule") or {}
    if not isinstance(schedule, dict) or (schedule and not {"start", "end"} <= schedule.keys()):
        raise TypeError(f"{where}.schedule: has no start and end")
    use = AdapterUse(
        name=name or None,
        digest=None if name else digest,
        expected_digest=digest if name else None,
        scale=real(f"{where}.scale", adapter.get("scale")),
        component_scales=_factors(f"{where}.component_scales", adapter.get("component_scales", ())),
        block_scales=_factors(f"{where}.block_scales", adapter.get("block_scales", ())),
        start=real(f"{where}.schedule.start", schedule["start"]) if schedule else None,
        end=real(f"{where}.schedule.end", schedule["end"]) if schedule else None,
        use_trigger_words=bool(adapter.get("use_trigger_words")),
    )
    if AdapterUse.parse(use_text(use, trigger=True)) != use:
        raise ValueError(f"{where}: cannot be written as --lora")
    return use


def _factors(where: str, pairs: object) -> dict[str, float]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(each, list) and len(each) == 2 for each in pairs):
        raise TypeError(f"{where}: is no list of pairs")
    return {text(where, name): real(where, factor) for name, factor in pairs}


def _guidance(value: object) -> SkipLayerGuidance:
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        raise TypeError("skip_layer_guidance: has no list of layers")
    layers: Iterable[object] = value["layers"]
    rest = {key: real(f"skip_layer_guidance.{key}", value[key]) for key in ("scale", "start", "stop") if key in value}
    return SkipLayerGuidance(tuple(whole("skip_layer_guidance.layers", each, _MAX_UINT32) for each in layers), **rest)


def _number(field: str, value: object) -> str:
    """The number, whole: six digits only where they are enough."""
    number = real(field, value)
    short = f"{number:g}"
    return short if float(short) == number else repr(number)

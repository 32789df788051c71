"""Tells by whose conventions a file was written, from its names and what it says of itself; nobody is asked.

The dialect is for the report and for what a missing alpha means. Names are understood whatever the dialect (`names`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from lora_server.adapters.formats.wrappers import without_wrappers

PEFT, DIFFUSERS, KOHYA, COMFYUI = "peft", "diffusers", "kohya", "comfyui"
AI_TOOLKIT, ONETRAINER, LYCORIS, XLABS, BFL = "ai-toolkit", "onetrainer", "lycoris", "xlabs", "bfl"
DIFFUSERS_CONFIGS = "lora_adapter_metadata"

_XLABS = re.compile(r"(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\.")
_KOHYA = re.compile(r"lora_(?:unet|te[123]?)_")
_LYCORIS_TENSORS = re.compile(r"\.(?:hada_|lokr_)")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Returns the dialect of a bare file."""
    names = [without_wrappers(key) for key in keys]

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if DIFFUSERS_CONFIGS in metadata:
        return DIFFUSERS
    if any(_XLABS.match(name) for name in names):
        return XLABS
    if any_starts("lora_transformer_") or _made_by(metadata, "onetrainer"):
        return ONETRAINER
    if any_starts("lycoris_") or _made_by(metadata, "lycoris"):
        return LYCORIS
    if any(_KOHYA.match(name) for name in names):
        return LYCORIS if any(_LYCORIS_TENSORS.search(name) for name in names) else KOHYA
    if _made_by(metadata, "ai-toolkit"):
        return AI_TOOLKIT
    if any_starts("diffusion_model.", "model.diffusion_model.", "text_encoders.", "clip_l.", "clip_g.", "t5"):
        return COMFYUI
    if any_starts("double_blocks.", "single_blocks."):
        return BFL
    if any_starts("base_model.model."):
        return PEFT
    return DIFFUSERS


def diffusers_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """The PEFT configurations that diffusers puts into a file's header, by component.

    Raises:
        ValueError: If there are some and they cannot be read.
    """
    if DIFFUSERS_CONFIGS not in metadata:
        return {}
    fields = json.loads(metadata[DIFFUSERS_CONFIGS])
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    configs: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        component, dot, field = without_wrappers(name).partition(".")
        if not dot:
            raise ValueError(f"{name!r} names no component")
        configs.setdefault(component, {})[field] = value
    return configs


def _made_by(metadata: Mapping[str, str], tool: str) -> bool:
    """Whether the file says that *tool* wrote it: in the fields where tools do."""
    said = (
        metadata.get(field, "") for field in ("software", "modelspec.implementation", "ss_network_module", "ot_branch")
    )
    text = " ".join(said).lower()
    return tool in text or (tool == "onetrainer" and any(field.startswith("ot_") for field in metadata))

"""Module names of all dialects to modules of the served model.

One table for all of them, made from the model's own module paths: a name is looked up by its component's prefix, then
as one of our paths or one of the original layout's, with dots or with underscores. So nothing is guessed from the
spelling (`to_out_0` is what the model calls `to_out.0`), and a name that is not in the table has no module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_server.adapters.formats.layouts.flux import flux_layout
from lora_server.adapters.formats.layouts.part import Layout, Part, Shapes
from lora_server.adapters.formats.layouts.sd3 import sd3_layout
from lora_server.adapters.formats.layouts.unet import unet_layout
from lora_server.adapters.formats.layouts.z_image import z_image_layout

Catalog = Mapping[str, Shapes]
"""By component, the shapes of the modules that adapters may change."""

_DENOISER, _CLIP_L, _CLIP_G, _T5 = "denoiser", "clip_l", "clip_g", "t5"
# The longest first. What stands for a component is its name, or one of the words above.
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", _DENOISER),
    ("diffusion_model.", _DENOISER),
    ("transformer.", _DENOISER),
    ("unet.", _DENOISER),
    ("text_encoders.clip_l.transformer.", _CLIP_L),
    ("text_encoders.clip_g.transformer.", _CLIP_G),
    ("text_encoders.t5xxl.transformer.", _T5),
    ("clip_l.transformer.", _CLIP_L),
    ("clip_g.transformer.", _CLIP_G),
    ("t5xxl.transformer.", _T5),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
    ("clip_l.", _CLIP_L),
    ("clip_g.", _CLIP_G),
    ("t5xxl.", _T5),
    ("t5.", _T5),
    ("lora_transformer_", _DENOISER),
    ("lora_unet_", _DENOISER),
    ("lycoris_", _DENOISER),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", _T5),
    ("lora_te_", "text_encoder"),
)
_PEFT_PREFIX = "base_model.model."
_UNET_NAME = re.compile(r"(?:down|up|mid|input|output|middle)_blocks?[._]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a file goes: *parts* of one component; no parts if the model is not known."""

    component: str
    parts: tuple[Part, ...]


class NameTable:
    """The modules of one model under all their names; without a *catalog*, only components can be told."""

    def __init__(self, catalog: Catalog | None, denoiser: str) -> None:
        self._catalog = catalog
        self._denoiser = denoiser
        self._names = {
            component: _all_names(shapes, component == denoiser) for component, shapes in (catalog or {}).items()
        }
        self._roles = _encoders(catalog or {}, denoiser)

    def place(self, name: str, component: str | None = None) -> Place | None:
        """Returns where the module *name* goes, or None if the model has no such module.

        *component* is set where the file says by other means, a folder, which component it is for.
        """
        name = name.removeprefix(_PEFT_PREFIX)
        if component is not None:
            return self._within(component, name)
        for prefix, word in _PREFIXES:
            if name.startswith(prefix):
                rest = name.removeprefix(prefix).removeprefix(_PEFT_PREFIX)
                found = self._within(self._component(word, rest), rest)
                if found is not None:
                    return found
        return self._within(self._component(_DENOISER, name), name)

    def _component(self, word: str, rest: str) -> str:
        if word == _DENOISER:
            return self._denoiser or ("unet" if _UNET_NAME.match(rest) else "transformer")
        return self._roles.get(word, word)

    def _within(self, component: str, name: str) -> Place | None:
        if self._catalog is None:
            return Place(component, ())
        names = self._names.get(component, {})
        for spelling in _spellings(name):
            if spelling in names:
                return Place(component, names[spelling])
        return None


def guess_denoiser(names: Iterable[str]) -> str:
    """What a model's denoiser is called, by the names in an adapter for it."""
    return "unet" if any(_UNET_NAME.search(name) for name in names) else "transformer"


def _spellings(name: str) -> tuple[str, ...]:
    """*name*, and how else it may be meant: early diffusers' processors, CLIP's paths with and without `text_model`."""
    plain = name.replace(".processor.", ".")
    if plain.endswith(".to_out"):
        plain += ".0"
    separator = "." if "." in name else "_"
    prefix = f"text_model{separator}"
    return name, plain, name.removeprefix(prefix), prefix + name


def _all_names(shapes: Shapes, is_denoiser: bool) -> Layout:
    """Our paths and the original layout's, with dots and with underscores."""
    dotted: dict[str, tuple[Part, ...]] = {}
    if is_denoiser:
        for layout in (sd3_layout, flux_layout, unet_layout, z_image_layout):
            dotted |= layout(shapes)
    dotted |= {path: (Part(path),) for path in shapes}
    return {name.replace(".", "_"): parts for name, parts in dotted.items()} | dotted


def _encoders(catalog: Catalog, denoiser: str) -> dict[str, str]:
    """Which component CLIP-L, CLIP-G and T5 are; their usual names where the model is not known."""
    if not catalog:
        return {_CLIP_L: "text_encoder", _CLIP_G: "text_encoder_2", _T5: "text_encoder_3"}
    encoders = [component for component in sorted(catalog) if component != denoiser]
    t5 = [component for component in encoders if any(".SelfAttention." in path for path in catalog[component])]
    clips = [component for component in encoders if component not in t5]
    words = dict(zip((_CLIP_L, _CLIP_G), clips, strict=False))
    return words | ({_T5: t5[0]} if t5 else {})

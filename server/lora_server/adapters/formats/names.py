"""Module names of all dialects to modules of the served model.

One table for all of them, made from the model's own module paths: a name is looked up by its component's prefix, then
as one of our paths or one of the original layout's, with dots or with underscores. So nothing is guessed from the
spelling (`to_out_0` is what the model calls `to_out.0`), and a name that is not in the table has no module. Prefixes
are taken off until none is left, whoever put them there; the first that names a component says which it is.
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
from lora_server.adapters.formats.wrappers import without_wrappers

Catalog = Mapping[str, Shapes]
"""By component, the shapes of the modules that adapters may change."""

_DENOISER, _CLIP_L, _CLIP_G, _T5 = "denoiser", "clip_l", "clip_g", "t5"
# What stands for a component is its name, or one of the words above; None says nothing of it.
_PREFIXES: Mapping[str, str | None] = {
    "base_model.model.": None,
    "pipe.": None,
    "module_": None,
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "transformer.": _DENOISER,
    "unet.": _DENOISER,
    "dit.": _DENOISER,
    "text_encoders.clip_l.transformer.": _CLIP_L,
    "text_encoders.clip_g.transformer.": _CLIP_G,
    "text_encoders.t5xxl.transformer.": _T5,
    "clip_l.transformer.": _CLIP_L,
    "clip_g.transformer.": _CLIP_G,
    "t5xxl.transformer.": _T5,
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "clip_l.": _CLIP_L,
    "clip_g.": _CLIP_G,
    "t5xxl.": _T5,
    "t5.": _T5,
    "lora_transformer_": _DENOISER,
    "lora_unet_": _DENOISER,
    "lycoris_": _DENOISER,
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": _T5,
    "lora_te_": "text_encoder",
}
_PREFIX = re.compile("|".join(re.escape(prefix) for prefix in sorted(_PREFIXES, key=len, reverse=True)))
_PEFT_PREFIX = "base_model.model."
_UNET_NAME = re.compile(r"(?:down|up|mid|input|output|middle)_blocks?[._]")
_TEXT_MODEL = "text_model."
"""What transformers called CLIP's only child before version 5."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a file goes.

    Attributes:
        component: Of the pipeline.
        parts: What of the component; none if the model is not known.
        name: The module's name in the file without prefixes.
        dotted: Its name in its component, by the file's layout, ours or the original one, with dots.
    """

    component: str
    parts: tuple[Part, ...]
    name: str
    dotted: str

    def written(self, prefixed: str | None) -> tuple[str, ...]:
        """The names that the file's writer may have had for the module, to match patterns with, the likeliest first.

        *prefixed* is the name in the file if its prefixes are the writer's own, and not whoever packed the file's.
        """
        own = self.name if prefixed is None else prefixed.removeprefix(_PEFT_PREFIX)
        if own == self.dotted and not self.is_text_encoders:
            return (own,)
        bare = self.dotted.removeprefix(_TEXT_MODEL)
        return tuple(dict.fromkeys((own, self.name, self.dotted, bare, _TEXT_MODEL + bare)))

    @property
    def is_text_encoders(self) -> bool:
        """Whether the name may have had or lost CLIP's `text_model.`."""
        return self.component.startswith("text_encoder") or self.dotted.startswith(_TEXT_MODEL)


class NameTable:
    """The modules of one model under all their names; without a *catalog*, only components can be told."""

    def __init__(self, catalog: Catalog | None, denoiser: str) -> None:
        self._catalog = catalog
        self._denoiser = denoiser
        self._dotted = {
            component: _all_names(shapes, component == denoiser) for component, shapes in (catalog or {}).items()
        }
        self._names = {
            component: {name.replace(".", "_"): name for name in names} | {name: name for name in names}
            for component, names in self._dotted.items()
        }
        self._roles = _encoders(catalog or {}, denoiser)

    def place(self, name: str, component: str | None = None) -> Place | None:
        """Returns where the module *name* goes, or None if the model has no such module.

        *component* is set where the file says by other means, a sub-folder, which component it is for.
        """
        for word, rest in reversed(_readings(name)):
            meant = self.component(word, rest) if word is not None else component or self.component(_DENOISER, rest)
            found = self._within(meant, rest) if component in (None, meant) else None
            if found is not None:
                return found
        return None

    def component(self, word: str, rest: str = "") -> str:
        """Which component *word* means: one of the table's words, or a component's own name."""
        if word == _DENOISER:
            return self._denoiser or ("unet" if _UNET_NAME.match(rest) else "transformer")
        return self._roles.get(word, word)

    def of_configuration(self, word: str) -> str:
        """Which component a configuration in a header is for, by the word before its fields."""
        return self.component(_PREFIXES.get(f"{word}.") or word)

    def same_layout(self, component: str, names: Iterable[str]) -> Mapping[str, tuple[Part, ...]]:
        """All modules of *component* under the names of one layout: ours if all of *names* are, else the original."""
        dotted, ours = self._dotted.get(component, {}), (self._catalog or {}).get(component, {})
        if all(name in ours for name in names):
            return {name: dotted[name] for name in ours if name in dotted}
        return {name: parts for name, parts in dotted.items() if name not in ours}

    def _within(self, component: str, name: str) -> Place | None:
        if self._catalog is None:
            return Place(component, (), name, name)
        names = self._names.get(component, {})
        for spelling in _spellings(name):
            if spelling in names:
                dotted = names[spelling]
                return Place(component, self._dotted[component][dotted], name, dotted)
        return None


def _readings(name: str) -> list[tuple[str | None, str]]:
    """*name* with no prefix taken off, with one, and so on; each with the word for its component, None if none says."""
    word: str | None = None
    found = [(word, name)]
    while match := _PREFIX.match(name):
        word, name = word or _PREFIXES[match[0]], name[match.end() :].lstrip("_")
        found.append((word, name))
    return found


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
    """Our paths and the original layout's, with dots."""
    dotted: dict[str, tuple[Part, ...]] = {}
    if is_denoiser:
        for layout in (sd3_layout, flux_layout, unet_layout, z_image_layout):
            dotted |= layout(shapes)
    return {without_wrappers(name): parts for name, parts in (dotted | {p: (Part(p),) for p in shapes}).items()}


def _encoders(catalog: Catalog, denoiser: str) -> dict[str, str]:
    """Which component CLIP-L, CLIP-G and T5 are; their usual names where the model is not known."""
    if not catalog:
        return {_CLIP_L: "text_encoder", _CLIP_G: "text_encoder_2", _T5: "text_encoder_3"}
    encoders = [component for component in sorted(catalog) if component != denoiser]
    t5 = [component for component in encoders if any(".SelfAttention." in path for path in catalog[component])]
    clips = [component for component in encoders if component not in t5]
    words = dict(zip((_CLIP_L, _CLIP_G), clips, strict=False))
    return words | ({_T5: t5[0]} if t5 else {})

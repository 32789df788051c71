"""Reports on a local file or folder as the server would, from headers alone: no torch, no model, no tensor is read but
for the digest. What a load and this have in common is one code: `companions`, `layout`, `report`.

The model to match against is told by the headers of its own files: what has a weight of two or four dimensions, and is
no embedding, is a linear or a convolution. (A test holds this against the loaded model's modules.)
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_server.adapters.companions import is_component, look_around
from lora_server.adapters.formats.header import Buffer, Limits, header_of_bytes
from lora_server.adapters.formats.inputs import Model, Rules
from lora_server.adapters.formats.layout import understand
from lora_server.adapters.formats.layouts.part import ModuleShape
from lora_server.adapters.formats.names import Catalog, guess_denoiser
from lora_server.adapters.formats.report import make_report
from lora_server.adapters.formats.values import check_values
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder, most_bytes
from lora_server.config import EngineConfig, LimitsConfig
from lora_server.errors import AdapterFileTooLargeError, AdapterSourceNotFoundError
from lora_server.types import Digest, LoadReport

_EVERYWHERE = AdapterRoots([Path("/")])
"""Whoever asks may read it."""
_SUFFIX = ".safetensors"
_DENOISERS = ("transformer", "unet")
_MAX_MODEL_HEADER_BYTES = 64 * 1024 * 1024
_FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen-image",
    "ZImagePipeline": "z-image",
}
_SD2_TEXT_FEATURES = 1024

_EMBEDDINGS = {
    "token_embedding", "position_embedding", "patch_embedding", "embed_tokens", "shared", "relative_attention_bias",
    "class_embedding",
}  # fmt: skip


_QWEN_VL = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))
_RENAMED: Mapping[str, Sequence[tuple[str, str]]] = {
    "CLIPTextModel": ((r"^text_model\.", ""),),
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Mistral3ForConditionalGeneration": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
}


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server would be like, as far as reading adapters goes; the defaults are a server's.

    Attributes:
        model: What it serves; None if it is not known, so that nothing is matched and modules are counted as named.
        limits: Its limits.
        slot_rank: What its slots hold.
    """

    model: Model | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    slot_rank: int = EngineConfig().page_columns * EngineConfig().num_pages


class Inspection:
    """One adapter, read from headers alone, in the way and with the rules of a load."""

    def __init__(self, path: Path, serving: Serving | None = None, *, allow_partial: bool = False) -> None:
        """Reads the headers.

        Raises:
            AdapterError: Whatever a load says that needs no values: see `loader.AdapterLoader.load`.
        """
        serving = serving or Serving()
        self._place = _EVERYWHERE.locate(os.path.abspath(path))
        self._name = self._place.name
        self._folder = _folder(self._place, serving.model)
        self._around = look_around(self._place, self._folder, allow_partial=allow_partial)
        limits = serving.limits
        paths = self._folder.paths().items()
        self._contents = {name: _mapped(self._name, name, file, limits) for name, file in paths}
        of_files = Limits(limits.max_adapter_header_bytes, limits.max_adapter_tensors)
        self._model = serving.model or Model("", _guess_denoiser(self._name, self._contents, of_files), None)
        rules = Rules(limits.max_rank, limits.max_adapter_modules, allow_partial)
        self._layout = understand(self._name, self._contents, self._model, rules, of_files)
        self._slot_rank = min(serving.slot_rank, limits.max_rank)

    def report(self) -> LoadReport:
        """What a load reports, but for the digest, which takes reading the whole file.

        Raises:
            AdapterMalformedError: If a card that is written for the server is not what it should be.
        """
        origin = "", sum(len(data) for data in self._contents.values())
        denoisers = (module for module in self._layout.plan.modules if module.component == self._model.denoiser)
        merged_only = any(module.is_merged_only(self._slot_rank) for module in denoisers)
        cards = self._folder.cards()
        return make_report(self._name, self._layout, origin, cards, self._around, merged_only=merged_only)

    def digest(self) -> Digest:
        """Reads everything and returns the version that the adapter is; takes a second or two for 400 MB.

        Raises:
            AdapterMalformedError: If a tensor has values that are not finite.
        """
        check_values(self._name, self._layout)
        return self._folder.digest_of(self._contents)


def _folder(place: Path, model: Model | None) -> AdapterFolder:
    components = list((model.catalog if model is not None else None) or {}) or _component_folders(place)
    return AdapterFolder(place, components, _EVERYWHERE)


def model_of_folder(folder: Path) -> Model:
    """Reads from the headers of a diffusers folder what adapters may change.

    Raises:
        ValueError: If it is none.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
        family = _family(folder, str(index["_class_name"]))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder} is not a diffusers folder: no readable model_index.json") from error
    adaptable = [name for name in names if name in _DENOISERS or name.startswith("text_encoder")]
    denoiser = next((name for name in adaptable if name in _DENOISERS), "")
    catalog: Catalog = {name: _component_shapes(folder / name) for name in adaptable}
    return Model(folder.resolve().name, denoiser, catalog, family)


def _family(folder: Path, pipeline_class: str) -> str:
    """A model's family as the server calls it; a test holds this against the families' own code."""
    if pipeline_class == "StableDiffusionPipeline":
        width = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")).get("cross_attention_dim")
        return "sd2" if width == _SD2_TEXT_FEATURES else "sd1"
    return _FAMILIES.get(pipeline_class, pipeline_class.removesuffix("Pipeline"))


def _model_file(file: Path) -> Buffer:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _component_shapes(folder: Path) -> dict[str, ModuleShape]:
    limits = Limits(header_bytes=_MAX_MODEL_HEADER_BYTES)
    renamed = _renamed(folder)
    shapes: dict[str, ModuleShape] = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        header = header_of_bytes(folder.name, file.name, _model_file(file), limits)
        for key, info in header.tensors.items():
            path = key.removesuffix(".weight")
            if path != key and len(info.shape) in (2, 4) and path.rpartition(".")[2] not in _EMBEDDINGS:
                kernel = (info.shape[2], info.shape[3]) if len(info.shape) == 4 else (1, 1)
                for pattern, ours in renamed:
                    path = re.sub(pattern, ours, path)
                shapes[path] = ModuleShape(info.shape[0], math.prod(info.shape[1:]), kernel)
    return shapes


def _renamed(folder: Path) -> Sequence[tuple[str, str]]:
    """How the loaded module's names differ from those in its files, which transformers keeps as they once were."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return next((_RENAMED[name] for name in config.get("architectures") or () if name in _RENAMED), ())
    except (OSError, ValueError, TypeError, AttributeError):
        return ()


def _component_folders(place: Path) -> list[str]:
    """Sub-folders that may be components of a PEFT adapter, where no model says which there are."""
    if not place.is_dir():
        return []
    return sorted(each.name for each in place.iterdir() if each.is_dir() and is_component(each.name))


def _guess_denoiser(adapter: str, contents: Mapping[str, Buffer], limits: Limits) -> str:
    keys = (
        key
        for name, data in contents.items()
        if name.endswith(_SUFFIX)
        for key in header_of_bytes(adapter, name, data, limits).tensors
    )
    return guess_denoiser(keys)


def _mapped(adapter: str, name: str, file: Path, limits: LimitsConfig) -> Buffer:
    """A file's bytes, of which only what is looked at is read."""
    limit = most_bytes(name, limits.max_adapter_file_bytes)
    try:
        with file.open("rb") as opened:
            size_bytes = file.stat().st_size
            if size_bytes > limit:
                raise AdapterFileTooLargeError(adapter, name, size_bytes, limit)
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size_bytes else b""
    except (OSError, ValueError) as error:
        raise AdapterSourceNotFoundError(name, str(error)) from error

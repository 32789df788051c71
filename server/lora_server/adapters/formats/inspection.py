"""Reports on a local file or folder as the server would, from headers alone: no torch, no model, no tensor is read but
for the digest.

The model to match against is told by the headers of its own files: what has a weight of two or four dimensions, and is
no embedding, is a linear or a convolution. (A test holds this against the loaded model's modules.)
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from lora_server.adapters.formats.header import Buffer, Limits, header_of_bytes
from lora_server.adapters.formats.inputs import Model, Rules
from lora_server.adapters.formats.layouts.part import ModuleShape
from lora_server.adapters.formats.names import Catalog, guess_denoiser
from lora_server.adapters.formats.plan import make_plan
from lora_server.adapters.formats.report import make_report
from lora_server.adapters.formats.sources import source_files
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import AdapterMalformedError, AdapterSourceNotFoundError
from lora_server.types import Digest, LoadReport

_SUFFIX = ".safetensors"
_DENOISERS = ("transformer", "unet")
_MAX_MODEL_HEADER_BYTES = 64 * 1024 * 1024
_SLOT_RANK = 128
"""What a server's slots hold by default."""

_EMBEDDINGS = {
    "token_embedding", "position_embedding", "patch_embedding", "embed_tokens", "shared", "relative_attention_bias",
    "class_embedding",
}  # fmt: skip


def inspect_adapter(
    path: Path, model: Model | None, *, allow_partial: bool = True, limits: Limits | None = None
) -> LoadReport:
    """Reports on the adapter at *path*; without a *model*, nothing is matched and modules are counted as named.

    Its digest is left empty, for that takes reading the whole file: see `digest_of`.

    Raises:
        AdapterSourceNotFoundError: If there is nothing to read.
        AdapterMalformedError, AdapterIncompatibleError: As when the server loads it; tensors without a module are
            reported and not refused, unless *allow_partial* is off.
    """
    folder = _folder(path, model)
    contents = {name: _mapped(file) for name, file in folder.paths().items()}
    limits = limits or Limits()
    if model is None:
        model = Model("", _guess_denoiser(path.name, contents, limits), None)
    files = source_files(path.name, contents, model.denoiser, limits)
    plan = make_plan(path.name, files, model, Rules(allow_partial=allow_partial))
    origin = "", sum(len(data) for data in contents.values())
    merged_only = any(m.is_merged_only(_SLOT_RANK) for m in plan.modules if m.component == model.denoiser)
    return make_report(path.name, plan, files, origin, folder.cards(), merged_only=merged_only)


def digest_of(path: Path, model: Model | None) -> Digest:
    """Returns the version that the adapter at *path* is; takes about a second for 400 MB.

    Raises:
        AdapterSourceNotFoundError, AdapterMalformedError: As `inspect_adapter`.
    """
    folder = _folder(path, model)
    return folder.digest_of({name: _mapped(file) for name, file in folder.paths().items()})


def _folder(path: Path, model: Model | None) -> AdapterFolder:
    everywhere = AdapterRoots([Path("/")])  # whoever asks may read it
    place = everywhere.locate(os.path.abspath(path))
    components = list((model.catalog if model is not None else None) or {}) or _component_folders(place)
    return AdapterFolder(place, components, everywhere)


def model_of_folder(folder: Path) -> Model:
    """Reads from the headers of a diffusers folder what adapters may change.

    Raises:
        ValueError: If it is none.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is not a diffusers folder: no readable model_index.json") from error
    adaptable = [name for name in names if name in _DENOISERS or name.startswith("text_encoder")]
    denoiser = next((name for name in adaptable if name in _DENOISERS), "")
    catalog: Catalog = {name: _component_shapes(folder / name) for name in adaptable}
    return Model(folder.name, denoiser, catalog)


def _component_shapes(folder: Path) -> dict[str, ModuleShape]:
    limits = Limits(header_bytes=_MAX_MODEL_HEADER_BYTES)
    shapes: dict[str, ModuleShape] = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        for key, info in header_of_bytes(folder.name, file.name, _mapped(file), limits).tensors.items():
            path = key.removesuffix(".weight")
            if path != key and len(info.shape) in (2, 4) and path.rpartition(".")[2] not in _EMBEDDINGS:
                kernel = (info.shape[2], info.shape[3]) if len(info.shape) == 4 else (1, 1)
                shapes[path] = ModuleShape(info.shape[0], math.prod(info.shape[1:]), kernel)
    return shapes


def _component_folders(place: Path) -> list[str]:
    """Sub-folders that may be components of a PEFT adapter, where no model says which there are."""
    if not place.is_dir():
        return []
    return sorted(each.name for each in place.iterdir() if each.is_dir() and each.name.startswith("text_encoder"))


def _guess_denoiser(adapter: str, contents: Mapping[str, Buffer], limits: Limits) -> str:
    keys = (
        key
        for name, data in contents.items()
        if name.endswith(_SUFFIX)
        for key in header_of_bytes(adapter, name, data, limits).tensors
    )
    return guess_denoiser(keys)


def _mapped(file: Path) -> Buffer:
    """A file's bytes, of which only what is looked at is read."""
    try:
        with file.open("rb") as opened:
            if not file.stat().st_size:
                raise AdapterMalformedError(file.name, "is empty", file.name)
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise AdapterSourceNotFoundError(file.name, str(error)) from error

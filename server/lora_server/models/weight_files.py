"""Which files of a component's folder are its weights: plain ones, or one of their variants (`model.fp16.safetensors`).

Names only, without torch, so that `lora-server check-config` says what a start would. Only safetensors are served: a
pickle may run anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What the libraries call their files."""
_WEIGHTS = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?(\.(?P<last>[^.]+))?\.safetensors"
)
_INDEX = re.compile(r"\w+?(\.(?P<variant>[^.]+))?\.safetensors\.index(\.(?P<last>[^.]+))?\.json")
_OTHER_FORMATS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx", ".flashpack"}


@dataclass(frozen=True, slots=True)
class Component:
    """One entry of model_index.json.

    Attributes:
        library: As the index has it: diffusers, transformers, or a module of diffusers' pipelines.
    """

    name: str
    library: str
    class_name: str


def components(index: Mapping[str, object]) -> list[Component]:
    """Returns the components that a parsed model_index.json names, without those that it says are absent."""
    pairs = ((name, entry) for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2)
    return [Component(name, *entry) for name, entry in pairs if all(isinstance(part, str) for part in entry)]


def choose_variants(
    folder: Path, parts: Iterable[Component], wanted: str | None, kinds: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Returns the variant to load of each component; None for plain files.

    Without a word it is the plain files, or the only variant that there is. The *wanted* one is taken wherever there is
    one, as diffusers does; other components keep to plain files.

    Args:
        kinds: The library whose names a component's files have, where the index does not tell it.

    Raises:
        ValueError: If a component has no weights to serve, several variants and no word, or files that are not there.
    """
    kinds = kinds or {}
    found = {part.name: _variants(folder / part.name, part, kinds.get(part.name, part.library)) for part in parts}
    everywhere = sorted({variant for variants in found.values() for variant in variants if variant})
    if wanted is not None and wanted not in everywhere:
        there = f"there are {', '.join(everywhere)}" if everywhere else "its weights have no variants"
        raise ValueError(f"no component has weights of the variant {wanted!r} (--variant): {there}")
    chosen = {name: _choice(name, variants, wanted) for name, variants in found.items()}
    for name, variant in chosen.items():
        _check_files(folder / name, variant)
    return chosen


def files_of(folder: Path, variant: str | None) -> list[Path]:
    """Returns the safetensors files of a component's variant, shards in their order."""
    return [
        path for path in sorted(folder.iterdir()) if (match := _WEIGHTS.fullmatch(path.name)) and _of(match) == variant
    ]


def shards_of(folder: Path, variant: str | None) -> dict[str, str]:
    """Returns by tensor the shard that the index of a component's variant names; empty if it is not in shards.

    Raises:
        ValueError: If the index cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        match = _INDEX.fullmatch(path.name)
        if match is None or (match["variant"] or match["last"]) != variant:
            continue
        try:
            found |= {str(name): str(shard) for name, shard in json.loads(path.read_bytes())["weight_map"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder.name}/{path.name} is not a readable index of shards ({error})") from error
    return found


def _variants(folder: Path, part: Component, library: str) -> set[str | None]:
    if not folder.is_dir():
        raise ValueError(f"model_index.json names the component {part.name}, which has no folder")
    names = [path.name for path in sorted(folder.iterdir())]
    stem = _STEMS.get(library)
    matches = [match for name in names if (match := _WEIGHTS.fullmatch(name)) and stem in (None, match["stem"])]
    if not matches:
        raise ValueError(_no_weights(part.name, names, f"{stem or 'model'}.safetensors"))
    return {_of(match) for match in matches}


def _choice(name: str, variants: set[str | None], wanted: str | None) -> str | None:
    for choice in (wanted, None):
        if choice in variants:
            return choice
    if len(variants) > 1 or wanted is not None:
        there = ", ".join(sorted(each for each in variants if each))
        raise ValueError(f"the weights of {name} are there as the variants {there} only: say which (--variant)")
    return next(iter(variants))


def _check_files(folder: Path, variant: str | None) -> None:
    """Refuses links to nothing, and shards that are not there: a copy or a download that was cut short."""
    for file in files_of(folder, variant):
        if not file.is_file():
            raise ValueError(f"{folder.name}/{file.name} is a link to nothing; fetch the model again")
    missing = sorted(shard for shard in set(shards_of(folder, variant).values()) if not (folder / shard).is_file())
    if missing:
        raise ValueError(f"the weights of {folder.name} lack the shard {missing[0]}")


def _no_weights(component: str, names: Iterable[str], expected: str) -> str:
    others = [name for name in names if Path(name).suffix in _OTHER_FORMATS]
    misnamed = [name for name in names if name.endswith(".safetensors")]
    if others and not misnamed:
        kind = "quantised" if others[0].endswith(".gguf") else "no safetensors; a pickle may run anything"
        return f"the weights of {component} are there as {others[0]} only ({kind}): convert them to {expected}"
    there = f"; there is {misnamed[0]}" if misnamed else ""
    return f"{component} has no weights: there is no {expected}, nor a variant of it{there}"


def _of(match: re.Match[str]) -> str | None:
    return match["variant"] or match["last"]

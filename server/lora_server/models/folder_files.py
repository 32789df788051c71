"""What a model's folder says in names, configurations and headers, before anything is loaded; without torch.

A start and `lora-server check-config` ask the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_server.models.declared import Declared, declared, read_header, refuse_quantised
from lora_server.models.weight_files import Component, choose_variants, components, files_of, shards_of

_DENOISERS = ("unet", "transformer")
_PREDICTIONS = (None, "epsilon", "sample", "v_prediction", "flow_prediction")


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the parsed model_index.json of *folder*.

    Raises:
        ValueError: If there is none that names a class.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return {**index, "_class_name": str(index["_class_name"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no readable model_index.json ({error})") from error


def check_folder(folder: Path, variant: str | None, without: Collection[str]) -> None:
    """Refuses a folder whose names and headers alone tell that it cannot be served.

    Args:
        without: Components that are not loaded.

    Raises:
        ValueError: As a start would.
    """
    index = read_index(folder)
    parts = [part for part in components(index) if part.name not in without]
    for part in parts:
        check_config(part, read_config(folder / part.name))
    modules = [part for part in parts if (folder / part.name / "config.json").is_file()]
    for name, chosen in choose_variants(folder, modules, variant).items():
        said_by(next(part for part in modules if part.name == name), folder, chosen, index["_class_name"])


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a component's *folder*; empty if it has none.

    Raises:
        ValueError: If it cannot be read.
    """
    for name in ("config.json", "scheduler_config.json"):
        path = folder / name
        if path.is_file():
            try:
                return dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder.name}/{name} is not readable ({error})") from error
    return {}


def check_config(part: Component, config: Mapping[str, Any]) -> None:
    """Refuses a component whose own configuration is not of the class in model_index.json, or quantised.

    Raises:
        ValueError: With the component and what it says.
    """
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            raise ValueError(f"the configuration of {part.name} has a {field}: quantised weights are not served")
    if part.name == "scheduler" and (predicts := config.get("prediction_type")) not in _PREDICTIONS:
        raise ValueError(
            f"the scheduler's configuration says prediction_type {predicts!r}, which diffusers does not know"
        )
    said = config.get("_class_name", part.class_name)
    if said != part.class_name:
        raise ValueError(f"model_index.json names a {part.class_name} as {part.name}, whose own file says {said}")


def said_by(part: Component, folder: Path, variant: str | None, pipeline_class: str) -> Declared:
    """Returns what the files of a component say of themselves, if the folder's scheduler says it too.

    Raises:
        ValueError: If it does not, or if it cannot be served.
    """
    try:
        types, metadata = _headers(folder / part.name, variant)
        if part.name not in _DENOISERS:
            refuse_quantised(types, metadata)
            return Declared()
        said = declared(types, metadata, pipeline_class)
    except ValueError as error:
        raise ValueError(f"{part.name}: {error}") from error
    schedule = read_config(folder / "scheduler")
    does = schedule.get("prediction_type", "epsilon")
    if said.prediction_type not in (None, does):
        raise ValueError(f"the weights of {part.name} say {said.prediction_type}, the scheduler's configuration {does}")
    if said.zero_terminal_snr and not schedule.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"the weights of {part.name} say zero terminal SNR (ztsnr), the scheduler's configuration has no "
            "rescale_betas_zero_snr"
        )
    return said


def _headers(folder: Path, variant: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The types of all tensors of a component's variant, and what its files say of themselves."""
    types: dict[str, str] = {}
    metadata: dict[str, str] = {}
    shards = shards_of(folder, variant)
    for file in files_of(folder, variant):
        names, _, fields = read_header(file)
        if file.name in shards.values():
            _check_shard(file.name, names, {name for name in shards if shards[name] == file.name})
        types |= names
        metadata |= fields
    return types, metadata


def _check_shard(file: str, names: Collection[str], indexed: Collection[str]) -> None:
    """The libraries believe the index of one, and load what the other has."""
    for name in sorted(set(names) ^ set(indexed)):
        fault = "lacks" if name in indexed else "holds"
        raise ValueError(f"the shard {file} {fault} {name}, and its index says otherwise")

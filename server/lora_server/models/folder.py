"""Models of a folder in diffusers' layout: every component is loaded by its library and held to its own report.

What the libraries only warn of is refused here: tensors that are missing (they would be drawn at random, or stay
without memory), tensors that no module takes, and configurations that contradict model_index.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_server.models.folder_files import check_config, read_config, read_index, said_by
from lora_server.models.weight_files import Component, choose_variants, components

_MAX_NAMED = 3


def load(pipeline_class: type[Any], folder: Path, variant: str | None, **options: Any) -> Any:
    """Loads the folder as a pipeline of *pipeline_class*, on the CPU; *options* are of its `from_pretrained`.

    Raises:
        ValueError, OSError: If a component's files are not exactly its weights; the message names the tensor.
    """
    parts = weighted(read_index(folder), folder, options)
    variants = choose_variants(folder, parts, variant, {part.name: library_of(part) for part in parts})
    loaded = {
        part.name: load_component(part, folder, variants[part.name], options["dtype"], pipeline_class.__name__)
        for part in parts
    }
    pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, **loaded, **options)
    check_scheduler_file(pipeline.scheduler, folder)
    return pipeline


def weighted(index: Mapping[str, Any], folder: Path, without: Collection[str]) -> list[Component]:
    """Returns the components that have weights, and checks every configuration against the index.

    Raises:
        ValueError: If a component's configuration is of another class, or says that its weights are quantised.
    """
    found = []
    for part in components(index):
        if part.name in without:
            continue
        config = read_config(folder / part.name)
        check_config(part, config)
        _check_model_type(part, config)
        if _is_module(part):
            found.append(part)
    return found


def load_component(part: Component, folder: Path, variant: str | None, dtype: Any, pipeline_class: str) -> Any:
    """Loads one component, checked.

    Raises:
        ValueError: If a tensor is missing, has no place, or says what the folder's configuration does not.
    """
    said = said_by(part, folder, variant, pipeline_class)
    kind = class_of(part)
    options: dict[str, Any] = {} if variant is None else {"variant": variant}
    if library_of(part) == "transformers":
        options["ignore_mismatched_sizes"] = True  # and look at the report: its own message names no tensor
    module, report = kind.from_pretrained(
        folder / part.name,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
        dtype=dtype,
        **options,
    )
    for name, held, needed in report["mismatched_keys"]:
        raise ValueError(f"the weights of {part.name} hold {name} of shape {list(held)}, not {list(needed)}")
    surplus = set(report["unexpected_keys"]) - said.messages - _headless(module) - _unprojected(part)
    check_tensors(part.name, report["missing_keys"], surplus)
    return module


def check_tensors(component: str, missing: Collection[str], surplus: Collection[str]) -> None:
    """Refuses weights that are not exactly what the component's module has.

    Raises:
        ValueError: With the first names of both kinds.
    """
    faults = []
    if missing:
        faults.append(f"lack {_listed(missing)}")
    if surplus:
        faults.append(f"hold {_listed(surplus)}, which have no place in it")
    if faults:
        raise ValueError(f"the weights of {component} {', and '.join(faults)}")


def class_of(part: Component) -> type[Any]:
    """Returns the class that model_index.json names.

    Raises:
        ValueError: If neither library has it.
    """
    from diffusers import pipelines

    try:
        module = getattr(pipelines, part.library, None) or importlib.import_module(part.library)
        found: type[Any] = getattr(module, part.class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model_index.json names {part.library}.{part.class_name}, which is not there") from error
    return found


def library_of(part: Component) -> str:
    """Returns the library whose names the component's files have."""
    from diffusers import ModelMixin

    return "diffusers" if issubclass(class_of(part), ModelMixin) else "transformers"


def check_scheduler_file(scheduler: Any, folder: Path) -> None:
    """Refuses what a scheduler's file says of the network and its class does not heed.

    Raises:
        ValueError: With the class and the field.
    """
    import inspect

    config = read_config(folder / "scheduler")
    taken = inspect.signature(type(scheduler).__init__).parameters
    untold = {"epsilon", "flow_prediction"} if type(scheduler).__name__.startswith("FlowMatch") else {"epsilon"}
    for field in ("prediction_type", "rescale_betas_zero_snr"):
        if config.get(field) not in (None, False, *untold) and field not in taken:
            raise ValueError(f"its scheduler is a {type(scheduler).__name__}, which has no {field}")


def _is_module(part: Component) -> bool:
    from torch import nn

    return issubclass(class_of(part), nn.Module)


def _check_model_type(part: Component, config: Mapping[str, Any]) -> None:
    """What transformers write as `architectures` is no class of a pipeline; what kind of model it is, is compared."""
    reads = getattr(class_of(part), "config_class", None)
    kind = config.get("model_type")
    if reads is None or kind in (None, reads.model_type) or reads.base_config_key in config:  # the last: a part's whole
        return
    raise ValueError(f"model_index.json names a {part.class_name} as {part.name}, whose own file says {kind}")


def _headless(module: Any) -> set[str]:
    """A language model's head, where the class has none: what encodes a text ends before it."""
    head = getattr(module, "get_output_embeddings", None)
    return {"lm_head.weight"} if head is not None and head() is None else set()


def _unprojected(part: Component) -> set[str]:
    """What CLIP compares texts with images by, where the class ends before it; files of the encoder alone keep it."""
    return {"text_projection.weight", "logit_scale"} if part.class_name == "CLIPTextModel" else set()


def _listed(names: Collection[str]) -> str:
    first = sorted(names)[:_MAX_NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")

"""Which families there are, and how a folder or hub id becomes one of them.

The family is read from model_index.json before anything heavy is imported or loaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_server.config import ModelConfig
from lora_server.demo.paths import model_dir
from lora_server.models.fit import check_fit
from lora_server.models.folder import load as load_folder
from lora_server.models.folder_files import check_folder, read_index
from lora_server.models.settings import ModelSettings, read_settings
from lora_server.models.single_file import SingleFile, check_header, configuration, is_single_file, weights_file

if TYPE_CHECKING:
    from lora_server.models.base import ModelFamily

DEMO_MODEL = "demo"


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a family is, and what its pipeline is loaded with.

    Attributes:
        module, name: Of a class that is made from (pipeline, display name, settings).
        options: For the pipeline's `from_pretrained`.
        patch: Pixels of latents that its network takes as one token's channels; None if the parts are not known.
    """

    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: int | None = 1


_FAMILIES = {
    "StableDiffusion3Pipeline": _Entry("lora_server.models.sd3", "StableDiffusion3"),
    "StableDiffusionPipeline": _Entry(
        "lora_server.models.sd",
        "StableDiffusion",
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "StableDiffusionXLPipeline": _Entry("lora_server.models.sdxl", "StableDiffusionXL", {"add_watermarker": False}),
    "FluxPipeline": _Entry("lora_server.models.flux", "Flux", patch=4),
    "QwenImagePipeline": _Entry("lora_server.models.qwen_image", "QwenImage", patch=4),
    "ZImagePipeline": _Entry("lora_server.models.z_image", "ZImage"),
}
"""Families by the class of their diffusers pipeline, which model_index.json names."""

_ANY_OTHER = _Entry("lora_server.models.generic", "GenericPipeline", patch=None)
"""What drives the other pipelines of diffusers, if they draw images from text."""


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what would work."""


def load_model(config: ModelConfig) -> ModelFamily:
    """Loads the configured model onto its device; takes seconds to minutes, and downloads a hub id if need be.

    Raises:
        ModelLoadError: If there is no such model, its family is unknown, or its files do not load.
    """
    try:
        folder = configuration(config.model, config.config_folder) if is_single_file(config.model) else _folder(config)
        return _load(folder, config, _pipeline_class(folder, config.model))
    except ModelLoadError:
        raise
    except Exception as error:  # of libraries, over files that nobody foresaw
        raise ModelLoadError(f"Cannot load the model {config.model!r}: {_sentence(error)}.") from error


def check_files(config: ModelConfig) -> None:
    """Refuses a local model whose names and headers alone tell that it cannot be served; loads nothing, without torch.

    Raises:
        ValueError: As a start would.
    """
    try:
        if is_single_file(config.model):
            check_header(config.model, config.config_folder)
        elif os.path.isdir(config.model) and config.model != DEMO_MODEL:
            _check_folder(Path(config.model), config.variant)
    except Exception as error:
        raise ValueError(f"{config.model!r}: {_sentence(error)}") from error


def _check_folder(folder: Path, variant: str | None) -> None:
    index = read_index(folder)
    entry = _FAMILIES.get(index["_class_name"], _ANY_OTHER)
    if entry.patch is not None:
        check_fit(index, folder, entry.patch)
    check_folder(folder, variant, entry.options)


def _load(folder: Path, config: ModelConfig, pipeline_class: str) -> ModelFamily:
    _quieten_libraries()
    import diffusers

    from lora_server.models.devices import choose_device, choose_dtype
    from lora_server.models.loaded import check_numbers

    entry = _FAMILIES.get(pipeline_class, _ANY_OTHER)
    device = choose_device(config.device)
    found = getattr(diffusers, pipeline_class)
    if entry.patch is not None:
        check_fit(read_index(folder), folder, entry.patch)
    options = {"dtype": choose_dtype(config.dtype, device), **entry.options}
    if is_single_file(config.model):
        checkpoint = SingleFile(weights_file(config.model), folder, config.variant)
        pipeline = checkpoint.load(found, **options)
    else:
        pipeline = load_folder(found, folder, config.variant, **options)
    pipeline.to(device)
    check_numbers(pipeline)
    for module in pipeline.components.values():
        if hasattr(module, "requires_grad_"):
            module.requires_grad_(False).eval()
    return family_of(pipeline, _display_name(config.model), read_settings(folder))


def family_of(pipeline: Any, name: str, settings: ModelSettings) -> ModelFamily:
    """Makes a family of a pipeline of diffusers that is already on its device and in its type; takes it over.

    Raises:
        ValueError: If *settings* do not suit the family.
    """
    entry = _FAMILIES.get(type(pipeline).__name__, _ANY_OTHER)
    family: ModelFamily = getattr(importlib.import_module(entry.module), entry.name)(pipeline, name, settings)
    if settings.scheduler is not None and settings.scheduler not in family.info.schedulers:
        raise ValueError(f"its settings name the scheduler {settings.scheduler!r}, but it has its own only")
    return family


def _is_of_diffusers(pipeline_class: str) -> bool:
    """Whether diffusers has a pipeline of this name."""
    import diffusers

    found = getattr(diffusers, pipeline_class, None) if pipeline_class in dir(diffusers) else None
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def _quieten_libraries() -> None:
    """Keeps progress bars and hints for interactive users out of a service's log."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _folder(config: ModelConfig) -> Path:
    model = config.model
    if model == DEMO_MODEL:
        return model_dir()
    if os.path.isdir(model):
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelLoadError(
            f"There is no model folder {model!r}; name 'demo', a diffusers folder, a .safetensors file, or a hub id."
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    """Fetches a hub model's safetensors and configuration files, or finds them in the local hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"Cannot fetch the model {hub_id!r} from the Hugging Face hub: {error}. For a gated model accept its "
            "licence there and set HF_TOKEN."
        ) from error


def _pipeline_class(folder: Path, model: str) -> str:
    try:
        found = str(read_index(folder)["_class_name"])
    except ValueError as error:
        raise ModelLoadError(f"{model!r} is not a diffusers folder: {_sentence(error)}.") from error
    if found not in _FAMILIES and not _is_of_diffusers(found):
        raise ModelLoadError(
            f"{model!r} is a {found}, which diffusers does not have; this server knows "
            f"{', '.join(sorted(_FAMILIES))}, and drives any other text-to-image pipeline of diffusers."
        )
    return found


def _sentence(error: Exception) -> str:
    """An error in one line, with its type where that is the message (a KeyError)."""
    text = "".join(each if each.isprintable() else " " for each in str(error))
    text = " ".join(text.split()).rstrip(".")
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def _display_name(model: str) -> str:
    """A folder's own name; a file's as it was given, because links of a hub's cache lead to names of digits."""
    if is_single_file(model):
        return Path(model).name
    return Path(model).resolve().name if os.path.isdir(model) and model != DEMO_MODEL else model

"""Which families there are, and how a folder or hub id becomes one of them.

The family is read from model_index.json before anything heavy is imported or loaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_server.config import ModelConfig
from lora_server.demo.paths import model_dir
from lora_server.models.settings import read_settings

if TYPE_CHECKING:
    from lora_server.models.base import ModelFamily

DEMO_MODEL = "demo"
_FAMILIES = {"StableDiffusion3Pipeline": "sd3"}


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what would work."""


def load_model(config: ModelConfig) -> ModelFamily:
    """Loads the configured model onto its device; takes seconds to minutes, and downloads a hub id if need be.

    Raises:
        ModelLoadError: If there is no such model, its family is unknown, or its files do not load.
    """
    folder = _folder(config.model)
    pipeline_class = _pipeline_class(folder, config.model)
    if pipeline_class not in _FAMILIES:
        raise ModelLoadError(
            f"{config.model!r} is a {pipeline_class}; this server knows {', '.join(sorted(_FAMILIES))}."
        )
    try:
        return _load_sd3(folder, config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"Cannot load the model {config.model!r}: {error}") from error


def _load_sd3(folder: Path, config: ModelConfig) -> ModelFamily:
    _quieten_libraries()
    from diffusers import StableDiffusion3Pipeline

    from lora_server.models.devices import choose_device, choose_dtype
    from lora_server.models.sd3 import StableDiffusion3

    device = choose_device(config.device)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, dtype=choose_dtype(config.dtype, device), use_safetensors=True, local_files_only=True
    )
    pipeline.to(device)
    for module in pipeline.components.values():
        if hasattr(module, "requires_grad_"):
            module.requires_grad_(False).eval()
    return StableDiffusion3(pipeline, _display_name(config.model), read_settings(folder))


def _quieten_libraries() -> None:
    """Keeps progress bars and hints for interactive users out of a service's log."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _folder(model: str) -> Path:
    if model == DEMO_MODEL:
        return model_dir()
    if os.path.isdir(model):
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelLoadError(f"There is no model folder {model!r}; name 'demo', a diffusers folder, or a hub id.")
    return _download(model)


def _download(hub_id: str) -> Path:
    """Fetches a hub model's safetensors and configuration files, or finds them in the local hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"Cannot fetch the model {hub_id!r} from the Hugging Face hub: {error}. For a gated model accept its "
            "licence there and set HF_TOKEN."
        ) from error


def _pipeline_class(folder: Path, model: str) -> str:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{model!r} is not a diffusers folder: no readable model_index.json ({error}).") from error


def _display_name(model: str) -> str:
    return Path(model).resolve().name if os.path.isdir(model) and model != DEMO_MODEL else model

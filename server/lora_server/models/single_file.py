"""Checkpoints of one file, `--model model.safetensors`, in the original layout that most fine-tunes come in.

The file has weights only. Configuration and tokenizers come from a folder in diffusers' layout (`--model-config`), or,
without one, from the hub or its local cache, by what diffusers takes the file for. Only safetensors are read: a pickle
may run anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CONFIGURATION = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]


def is_single_file(model: str) -> bool:
    """Whether *model* names a file and not a folder or a hub id."""
    return model.endswith((".safetensors", ".ckpt")) or Path(model).is_file()


def configuration(file: Path, given: Path | None) -> Path:
    """Returns the folder that says what the file's weights mean: *given*, or one that is fetched.

    Raises:
        ValueError: If the file is not a readable checkpoint, or its configuration is not to be had; says what would
            help.
    """
    if not file.is_file():
        raise ValueError("there is no such file")
    if file.suffix != ".safetensors":
        raise ValueError("only .safetensors files are read, because a pickle may run anything; convert it")
    if given is not None:
        return given
    return _fetched(hub_id(file))


def hub_id(file: Path) -> str:
    """The hub repository whose configuration diffusers takes for the checkpoint, by its tensors' names and shapes."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: _Shaped(tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is not a valid safetensors file ({error})") from error
    if not any("." in name for name in shapes):
        raise ValueError("it holds no model")
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def load(pipeline_class: Any, file: Path, configured_by: Path, **options: Any) -> Any:
    """Loads the file as a pipeline of *pipeline_class*; never reaches for the hub.

    Raises:
        ValueError: If the file lacks weights that the configuration asks for, such as a text encoder's.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if not hasattr(pipeline_class, "from_single_file"):
        raise ValueError(f"diffusers reads no single files of a {pipeline_class.__name__}; use a folder")
    try:
        return pipeline_class.from_single_file(str(file), config=str(configured_by), local_files_only=True, **options)
    except SingleFileComponentError as error:
        raise ValueError(
            f"the file lacks weights that {configured_by} asks for ({error}); a file of the denoiser alone cannot be "
            "served: save it as a folder with its text encoders and autoencoder (diffusers' save_pretrained)"
        ) from error


class _Shaped:
    """A tensor's shape, which is all that telling the model's kind needs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _fetched(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_CONFIGURATION))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"diffusers takes it for a model configured like {repository!r}, whose configuration files are neither in "
            "the local hub cache nor to be fetched. Pass --model-config DIR: a folder of such a model in diffusers' "
            "layout (model_index.json, the components' config.json, the tokenizers; no weights needed)"
        ) from error

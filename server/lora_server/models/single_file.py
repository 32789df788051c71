"""Checkpoints of one file, `--model model.safetensors`, in the original layout that most fine-tunes come in.

The file has weights only. Configuration and tokenizers come from a folder in diffusers' layout (`--model-config`), or,
without one, from the hub or its local cache, by what diffusers takes the file for. Only safetensors are read: a pickle
may run anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_server.models.declared import declared, read_header
from lora_server.models.folder import check_scheduler_file, weighted
from lora_server.models.folder_files import read_index
from lora_server.models.schedulers import as_declared

_CONFIGURATION = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]
_SUFFIX = ".safetensors"
_EMA, _TRAINED = "ema", "non_ema"
"""What diffusers' folders call the weights averaged over the training, and the others."""
_EMA_PREFIX = "model_ema."
_NOISE_LEVELS = "alphas_cumprod"
_PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"
_OTHER_TASKS = ("inpaint", "refiner", "upscale", "pix2pix", "controlnet", "playground", "fill", "depth")
_KINDS = {
    "StableDiffusionPipeline": ("v2",), "StableDiffusionXLPipeline": ("xl_base",),
    "StableDiffusion3Pipeline": ("sd3", "sd35_medium", "sd35_large"), "FluxPipeline": ("flux-dev", "flux-schnell"),
    "ZImagePipeline": ("z-image-turbo",),
}  # fmt: skip
"""What diffusers may take the files of a pipeline for."""


def is_single_file(model: str) -> bool:
    """Whether *model* names a file and not a folder or a hub id."""
    return model.endswith((_SUFFIX, ".ckpt", ".gguf")) or Path(model).is_file()


def weights_file(model: str) -> Path:
    """Returns the file to read: a link by whichever of its names says what it is.

    Raises:
        ValueError: If there is none, or of another format.
    """
    file = Path(model)
    if not file.is_file():
        raise ValueError("there is no such file")
    for named in (file, file.resolve()):
        if named.suffix == _SUFFIX:
            return named
    if file.suffix == ".gguf":
        raise ValueError("the weights of a GGUF file are quantised: serve them as .safetensors of 16 or 32 bits")
    raise ValueError("only .safetensors files are read, because a pickle may run anything; convert it")


def check_header(model: str, configured_by: Path | None) -> None:
    """Refuses a file that is no checkpoint, or whose header says what cannot be served; without torch.

    Raises:
        ValueError: As a start would, as far as is known without fetching a configuration.
    """
    types, _, metadata = read_header(weights_file(model))
    if configured_by is not None:
        declared(types, metadata, read_index(configured_by)["_class_name"])


def configuration(model: str, given: Path | None) -> Path:
    """Returns the folder that says what the file's weights mean: *given*, or one that is fetched.

    Raises:
        ValueError: If the file is not a readable checkpoint, or its configuration is not to be had; says what would
            help.
    """
    file = weights_file(model)
    if given is not None:
        return given
    return _fetched(hub_id(file))


def hub_id(file: Path) -> str:
    """The hub repository whose configuration diffusers takes for the checkpoint, by its tensors' names and shapes."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    types, shapes, metadata = read_header(file)
    if not any("." in name for name in shapes):
        raise ValueError("it holds no model")
    found = str(fetch_diffusers_config(_shaped(shapes))["pretrained_model_name_or_path"])
    if "stable-diffusion-2" in found and declared(types, metadata, "StableDiffusionPipeline").prediction_type is None:
        raise ValueError(
            "it is an SD 2.x, some of which predict noise and others velocity, and it does not say which. Pass "
            "--model-config DIR: a folder of the model that it was made from, in diffusers' layout"
        )
    return found


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint, and what to make of it.

    Attributes:
        file, configured_by: The weights, and the folder that says what they mean.
        variant: Which weights of the denoiser, ema or non_ema, where the file has both.
    """

    file: Path
    configured_by: Path
    variant: str | None

    def load(self, pipeline_class: type[Any], **options: Any) -> Any:
        """Loads the file as a pipeline, scheduled as the file says; *options* are of its `from_single_file`.

        Never reaches for the hub, and takes no weights from the folder.

        Raises:
            ValueError: If the file's weights are not exactly the model's, or say what cannot be served.
        """
        from lora_server.models.single_file_check import check_file

        if not hasattr(pipeline_class, "from_single_file"):
            raise ValueError(f"diffusers reads no single files of a {pipeline_class.__name__}; use a folder")
        types, shapes, metadata = read_header(self.file)
        said = declared(types, metadata, pipeline_class.__name__)
        if self.variant is not None and not said.ema:
            raise ValueError(f"it has no variants, so there is no {self.variant!r} (--variant)")
        _refuse_other_kinds(shapes, pipeline_class.__name__)
        spare = self._spare(shapes) if said.ema else frozenset()
        chosen = {"extract_ema": self.variant == _EMA} if said.ema else {}
        parts = weighted(read_index(self.configured_by), self.configured_by, options)
        check_file(shapes, parts, self.configured_by, said.messages | spare | self._unit_projections(shapes), **chosen)
        pipeline = pipeline_class.from_single_file(
            str(self.file), config=str(self.configured_by), local_files_only=True, **chosen, **options
        )
        for module in pipeline.components.values():
            if hasattr(module, "tie_weights"):
                module.tie_weights()  # which diffusers leaves undone
        check_scheduler_file(pipeline.scheduler, self.configured_by)
        pipeline.scheduler = as_declared(pipeline.scheduler, said)
        if _NOISE_LEVELS in shapes:
            self._check_noise_levels(pipeline.scheduler)
        return pipeline

    def _check_noise_levels(self, scheduler: Any) -> None:
        """Holds the scheduler to the training's noise levels; trainers write them before they move the last to zero."""
        import torch
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            trained = opened.get_tensor(_NOISE_LEVELS).double()
        configured = [scheduler, type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=False)]
        levels = [each.alphas_cumprod.double() for each in configured if hasattr(each, "alphas_cumprod")]
        if not any(each.shape == trained.shape and torch.allclose(each, trained, 1e-2, 1e-3) for each in levels):
            raise ValueError(f"its tensor {_NOISE_LEVELS} has other noise levels than its scheduler's configuration")

    def _spare(self, shapes: Mapping[str, object]) -> frozenset[str]:
        """Of two sets of the denoiser's weights, the names of the one that is not wanted."""
        if self.variant not in (_EMA, _TRAINED):
            raise ValueError(
                f"it holds the denoiser's weights twice, as trained and averaged ({_EMA_PREFIX}*): say which by "
                f"--variant {_TRAINED} or --variant {_EMA}"
            )
        averaged = frozenset(name for name in shapes if name.startswith(_EMA_PREFIX))
        if self.variant == _TRAINED:
            return averaged
        twins = {name: _EMA_PREFIX + "".join(name.split(".")[1:]) for name in shapes if name not in averaged}
        return frozenset(name for name, twin in twins.items() if twin in averaged)

    def _unit_projections(self, shapes: Mapping[str, object]) -> set[str]:
        """SD3's first projection of the text, if it is the identity, which diffusers writes whatever the file has."""
        import torch
        from safetensors import safe_open

        if _PROJECTION not in shapes:
            return set()
        with safe_open(self.file, framework="pt") as opened:
            matrix = opened.get_tensor(_PROJECTION).float()
        return {_PROJECTION} if torch.equal(matrix, torch.eye(matrix.shape[-1])) else set()


def _refuse_other_kinds(shapes: Mapping[str, tuple[int, ...]], pipeline_class: str) -> None:
    """Says what diffusers takes the file for, if that is of another task or another model; "v1" is its last guess."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(_shaped(shapes))
    except (AttributeError, TypeError, IndexError, UnboundLocalError):  # shapes that diffusers does not expect
        return
    if any(task in kind for task in _OTHER_TASKS):
        raise ValueError(f"by its tensors it is of the kind {kind!r}, which is no plain text-to-image model")
    if kind not in ("v1", *_KINDS.get(pipeline_class, (kind,))):
        raise ValueError(f"by its tensors it is of the kind {kind!r}, which is not for a {pipeline_class}")


def _shaped(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors that have shapes, which is all that telling the model's kind needs."""
    return {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}


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

"""Whether a checkpoint of one file holds exactly a model's weights, told from its header alone.

diffusers' own loaders run on tensors that have shapes, no bytes, and the names that they were made of. What they leave
without a value is missing, and what they use nowhere is surplus, whatever the layout and its conversion.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lora_server.models.folder import check_tensors, class_of
from lora_server.models.weight_files import Component

_HARMLESS = re.compile(
    r"(^|\.)position_ids$"  # 0, 1, 2, ...
    r"|(^|\.)logit_scale$"  # of CLIP's training, which compares texts with images
    # SD and the first encoder of SDXL are read by their hidden states:
    r"|^(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection\.weight$"
    r"|^cond_stage_model\.model\.(text_projection|attn_mask)$"
    r"|^first_stage_model\.(loss|model_ema)\."  # of the autoencoder's training
    r"|^model_ema\.(decay|num_updates)$"  # which are left where the averaged weights were pruned
    # The training's noise levels, which the scheduler's configuration has:
    r"|^(betas|(log_one_minus_|sqrt_(one_minus_|recip_|recipm1_)?)?alphas_cumprod(_prev)?|denoiser\.sigmas)$"
    r"|^(posterior_\w+|logvar|lvlb_weights|scale_factor)$"
    r"|^(global_step|epoch|iteration)$"
)
"""Of a checkpoint as it is trained; no picture depends on them."""


class _Traced(torch.Tensor):
    """A tensor without bytes that knows which tensors of the file it was made of; moves nowhere, keeps its type."""

    origins: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        known: list[frozenset[str]] = [getattr(each, "origins", frozenset()) for each in tree_leaves((args, kwargs))]
        for each in tree_leaves(result):
            if isinstance(each, _Traced):
                each.origins = getattr(each, "origins", frozenset()).union(*known)
        return result


def check_file(
    shapes: Mapping[str, tuple[int, ...]],
    parts: list[Component],
    configured_by: Path,
    spare: Collection[str],
    **options: Any,
) -> None:
    """Refuses a file whose tensors are not exactly those of *parts*, as *configured_by* says; loads nothing.

    Args:
        shapes: Of the file's tensors.
        spare: Tensors that need no place: those that only say something, or are not wanted.
        options: For diffusers' loader.

    Raises:
        ValueError: With the names of what is missing or surplus, or with the shape that does not fit.
    """
    checkpoint = {name: _traced(name, shape) for name, shape in shapes.items()}
    used = set(spare)
    for part in parts:
        module = _loaded(part, checkpoint, configured_by, options)
        state = module.state_dict(keep_vars=True)
        traced = {name: tensor for name, tensor in state.items() if isinstance(tensor, _Traced)}
        tied = getattr(module, "all_tied_weights_keys", {})
        missing = [name for name in state if state[name].is_meta and not {name, tied.get(name)} & traced.keys()]
        check_tensors(part.name, missing, ())
        used.update(*(tensor.origins for tensor in traced.values()))
    check_tensors("the file", (), [name for name in shapes if name not in used and not _is_harmless(name)])


def _traced(name: str, shape: tuple[int, ...]) -> _Traced:
    tensor = torch.empty(shape, device="meta").as_subclass(_Traced)
    tensor.origins = frozenset({name})
    return tensor


def _loaded(part: Component, checkpoint: Mapping[str, _Traced], configured_by: Path, options: Mapping[str, Any]) -> Any:
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        if not _is_asked_for(part, checkpoint):
            raise SingleFileComponentError
        return load_single_file_sub_model(
            library_name=part.library, class_name=part.class_name, name=part.name, checkpoint=dict(checkpoint),
            pipelines=pipelines, is_pipeline_module=hasattr(pipelines, part.library),
            cached_model_config_path=str(configured_by), local_files_only=True, device="meta", **options,
        )  # fmt: skip
    except SingleFileComponentError as error:
        raise ValueError(
            f"the file lacks weights that {configured_by} asks for, of {part.name}; a file of the denoiser alone "
            "cannot be served: save it as a folder with its text encoders and autoencoder (diffusers' save_pretrained)"
        ) from error
    except (KeyError, IndexError) as error:  # of a conversion that looks for what the file lacks
        raise ValueError(f"the weights of {part.name} lack {error}") from error


def _is_asked_for(part: Component, checkpoint: Mapping[str, _Traced]) -> bool:
    """Whether diffusers looks for the component in the file; others it would take from the configuration's folder."""
    from diffusers.loaders import FromOriginalModelMixin
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

    kind = class_of(part)
    if issubclass(kind, FromOriginalModelMixin) or is_clip_model_in_single_file(kind, checkpoint):
        return True
    return "T5" in part.class_name and is_t5_in_single_file(checkpoint)


def _is_harmless(name: str) -> bool:
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    return name in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE or bool(
        _HARMLESS.search(name)
    )  # SD 2.x reads the last layer but one

"""What can be read off a pipeline of diffusers that nobody has prepared for: its parts, its defaults, what it needs.

Pure functions of the pipeline and of the signature of its call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_server.models.settings import FamilyDefaults
from lora_server.types import GenerationParameters

Accepts = Mapping[str, inspect.Parameter]
"""The parameters of the pipeline's `__call__`."""

_DENOISERS = ("transformer", "unet")
_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator")
_SIDE_PX = 1024


class UnsuitablePipelineError(ValueError):
    """A pipeline that cannot be driven; the message says why."""


def denoiser_of(pipeline: Any) -> str:
    """The name of the component that denoises."""
    for name in _DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise UnsuitablePipelineError(f"it has none of the components {', '.join(_DENOISERS)}")


def check_suitable(pipeline: Any, accepts: Accepts) -> None:
    """Refuses what does not draw images from text alone, or does not report its steps.

    Raises:
        UnsuitablePipelineError: If it does not.
    """
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING

    missing = [name for name in _NEEDED if name not in accepts]
    if missing:
        raise UnsuitablePipelineError(f"its __call__ does not take {', '.join(missing)}")
    if not {"callback_on_step_end", "callback"} & set(accepts):
        raise UnsuitablePipelineError("its __call__ has no callback, so it could not be cancelled")
    if "num_frames" in accepts:
        raise UnsuitablePipelineError("it makes videos, not images")
    if not hasattr(pipeline.scheduler, "step"):
        raise UnsuitablePipelineError("it has no scheduler")
    others = {*AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values(), *AUTO_INPAINT_PIPELINES_MAPPING.values()}
    if type(pipeline) in others or "controlnet" in pipeline.components:
        raise UnsuitablePipelineError("it starts from an image")


def own_defaults(pipeline: Any, config: Any, accepts: Accepts) -> FamilyDefaults:
    """The defaults of the pipeline's signature, and the size that its denoiser's *config* names."""
    side = getattr(config, "sample_size", None) or getattr(pipeline, "default_sample_size", None)
    side_px = side * _vae_scale(pipeline) if isinstance(side, int) else _SIDE_PX
    multiple = size_multiple(pipeline, config)
    steps, guidance = (_default(accepts, name) for name in ("num_inference_steps", "guidance_scale"))
    return FamilyDefaults(
        side_px=max(1, side_px // multiple) * multiple,
        num_inference_steps=int(steps or 50),
        guidance_scale=float(guidance or 0.0),
    )


def size_multiple(pipeline: Any, config: Any) -> int:
    """Pixels that every part of the pipeline can divide: the VAE's, and patches of its latents if there are any."""
    processor = getattr(pipeline, "image_processor", None)
    patch = getattr(config, "patch_size", 1)
    by_patch = _vae_scale(pipeline) * (patch if isinstance(patch, int) else 2)
    return max(by_patch, int(getattr(getattr(processor, "config", None), "vae_scale_factor", 1)))


def preview_latents(pipeline: Any, latents: Any, parameters: GenerationParameters) -> Tensor | None:
    """The latents as the pipeline's VAE takes them, (1, C, H, W), if they can be had in that form."""
    vae = getattr(pipeline, "vae", None)
    if vae is None or not isinstance(latents, Tensor) or not getattr(vae.config, "scaling_factor", None):
        return None
    unpack = getattr(pipeline, "_unpack_latents", None)
    if latents.ndim == 3 and unpack is not None and "vae_scale_factor" in inspect.signature(unpack).parameters:
        latents = unpack(latents, parameters.height_px, parameters.width_px, pipeline.vae_scale_factor)
    fits = latents.ndim == 4 and latents.shape[:2] == (1, vae.config.get("latent_channels"))
    return latents.clone() if fits else None


def takes_negative_prompts(accepts: Accepts) -> bool:
    """Whether a negative prompt can act: where true guidance has a scale of its own, that must be on by default.

    Requests have no word for it: theirs is `guidance_scale`, which means something else to such a pipeline.
    """
    return "negative_prompt" in accepts and float(_default(accepts, "true_cfg_scale") or 2.0) > 1


def watched_modules(pipeline: Any, denoiser: str) -> dict[str, nn.Module]:
    """The modules whose outputs have to be finite: the networks that denoise, and the decoders of autoencoders.

    Not the encoders of text: what they give of padding is read by nobody and may be anything.
    """
    return {
        name: module if name == denoiser else _decoder_of(module)
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module) and "encoder" not in name and name != "safety_checker"
    }


def _decoder_of(module: nn.Module) -> nn.Module:
    """The part of an autoencoder that `decode` calls as a module; of other networks the whole."""
    decoder = getattr(module, "decoder", None)
    return decoder if isinstance(decoder, nn.Module) else module


def vae_shift(vae: Any) -> float:
    """What the VAE adds to its latents after scaling them."""
    return getattr(vae.config, "shift_factor", None) or 0.0


def _default(accepts: Accepts, name: str) -> Any:
    parameter = accepts.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _vae_scale(pipeline: Any) -> int:
    return int(getattr(pipeline, "vae_scale_factor", 8))

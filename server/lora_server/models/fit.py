"""Whether the parts that a model's folder names fit each other and the class of its pipeline, by their configurations.

A network of another task (inpainting, editing, refining) under the class of plain text-to-image would load, and fail at
its first step, or draw something else. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_server.models.folder_files import read_config

_NEEDED = ("unet", "transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def check_fit(index: Mapping[str, Any], folder: Path, patch: int) -> None:
    """Refuses a folder whose network is of another task or of another model than its pipeline.

    Args:
        patch: Pixels of latents that are one token's channels.

    Raises:
        ValueError: If a part is absent, or takes what the others do not give.
    """
    absent = [name for name in _NEEDED if name in index and index[name] == [None, None]]
    if absent:
        raise ValueError(f"model_index.json says that it has no {absent[0]}")
    vae = read_config(folder / "vae")
    latents = vae.get("latent_channels") or vae.get("z_dim")
    denoiser = next((name for name in ("unet", "transformer") if name in index), None)
    if denoiser is not None and latents:
        _check_channels(denoiser, read_config(folder / denoiser), latents, patch)
    if denoiser == "unet":
        _check_text_input(index["_class_name"], folder)


def _check_channels(name: str, config: Mapping[str, Any], channels: int, patch: int) -> None:
    latents = channels * patch
    taken = config.get("in_channels") or latents
    given = config.get("out_channels") or latents
    if taken != latents:
        raise ValueError(
            f"its {name} takes {taken} channels, and the latents of an image have {latents}: {_task(taken, latents)}, "
            "and draws from more than text"
        )
    if given not in (latents, channels):  # of a token, or of a pixel
        raise ValueError(f"its {name} gives {given} channels, and the latents of an image have {latents}")


def _task(taken: int, latents: int) -> str:
    """What networks of so many channels are for, as a rule: latents, and masks or images beside them."""
    kinds = {
        2 * latents + 1: "it is for inpainting",
        2 * latents: "it edits images (instruct-pix2pix), or follows one (depth, edges)",
        latents + 1: "it is for depth maps",
        latents + 3: "it is an upscaler",
        6 * latents: "it fills in (FLUX Fill)",
    }
    return kinds.get(taken, "it is for another task")


def _check_text_input(pipeline_class: str, folder: Path) -> None:
    """Whether a UNet reads as much text as the encoders give, and as many conditions, as far as that is said."""
    unet = read_config(folder / "unet")
    first, second = (_text_config(folder / name) for name in ("text_encoder", "text_encoder_2"))
    is_xl = pipeline_class == "StableDiffusionXLPipeline"
    if is_xl and "projection_dim" in second:
        conditions = 6 * (unet.get("addition_time_embed_dim") or 0) + second["projection_dim"]
        taken = unet.get("projection_class_embeddings_input_dim")
        if taken != conditions:
            raise ValueError(
                f"its unet takes {taken} conditions beside the text, and those of SDXL are {conditions}: it is a "
                "refiner, or of another model"
            )
    widths = [config.get("hidden_size", 0) for config in ((first, second) if is_xl else (first,))]
    reads = unet.get("cross_attention_dim")
    if isinstance(reads, int) and all(widths) and reads != sum(widths):
        raise ValueError(f"its unet reads texts of width {reads}, and its text encoders give {sum(widths)}")


def _text_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return dict(config.get("text_config") or config)

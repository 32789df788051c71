"""What a model's folder may say of itself beside model_index.json: the file `lora_inference.json`.

diffusers ignores the file. A folder without it gets the defaults below, which are the seed system's for SD3.5-medium.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lora_server.types import ModelDefaults

FILE_NAME = "lora_inference.json"


class ModelSettings(BaseModel):
    """A model's own defaults; sides of None mean the size that the denoiser was trained at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width_px: int | None = Field(default=None, gt=0, description="Default width in pixels.")
    height_px: int | None = Field(default=None, gt=0, description="Default height in pixels.")
    num_inference_steps: int = Field(default=50, gt=0, description="Default number of denoising steps.")
    guidance_scale: float = Field(
        default=7.0, ge=0, allow_inf_nan=False, description="Default guidance; 7.0 is StableDiffusion3Pipeline's own."
    )
    max_sequence_length: int = Field(
        default=256, gt=0, description="Tokens of the T5 encoder; 256 is the pipeline's own."
    )

    def defaults(self, native_side_px: int) -> ModelDefaults:
        """Returns the defaults of a model whose denoiser was trained at *native_side_px*."""
        return ModelDefaults(
            width_px=self.width_px or native_side_px,
            height_px=self.height_px or native_side_px,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )


def read_settings(folder: Path) -> ModelSettings:
    """Reads the folder's settings, or returns the defaults if it has none.

    Raises:
        pydantic.ValidationError: If the file is there but wrong.
    """
    path = folder / FILE_NAME
    return ModelSettings.model_validate_json(path.read_bytes()) if path.is_file() else ModelSettings()

"""What a model's folder may say of itself beside model_index.json: the file `lora_inference.json`.

diffusers ignores the file. What it leaves out is the family's own, as its pipeline in diffusers has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lora_server.types import ModelDefaults

FILE_NAME = "lora_inference.json"


@dataclass(frozen=True, slots=True)
class FamilyDefaults:
    """What a family takes where a model's folder says nothing.

    Attributes:
        side_px: Width and height, which the denoiser was trained at.
        max_sequence_length: Tokens of the text encoder whose length can be chosen, if there is one.
    """

    side_px: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None = None


class ModelSettings(BaseModel):
    """A model's own defaults; None means its family's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width_px: int | None = Field(default=None, gt=0, description="Default width in pixels.")
    height_px: int | None = Field(default=None, gt=0, description="Default height in pixels.")
    num_inference_steps: int | None = Field(default=None, gt=0, description="Default number of denoising steps.")
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="Default guidance.")
    max_sequence_length: int | None = Field(
        default=None, gt=0, description="Tokens of the text encoder whose length can be chosen, if there is one."
    )

    scheduler: str | None = Field(
        default=None, description="Scheduler in place of the folder's own, by the name that requests use (UNets only)."
    )
    cfg_normalization: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="Z-Image: most norm of guided predictions, 0 for no bound."
    )
    cfg_truncation: float = Field(
        default=1, ge=0, allow_inf_nan=False, description="Z-Image: share of the way after which guidance ends."
    )

    def defaults(self, family: FamilyDefaults) -> ModelDefaults:
        """Returns what a request that says nothing gets."""
        scale = self.guidance_scale
        return ModelDefaults(
            width_px=self.width_px or family.side_px,
            height_px=self.height_px or family.side_px,
            num_inference_steps=self.num_inference_steps or family.num_inference_steps,
            guidance_scale=family.guidance_scale if scale is None else scale,
        )


def read_settings(folder: Path) -> ModelSettings:
    """Reads the folder's settings, or returns the defaults if it has none.

    Raises:
        pydantic.ValidationError: If the file is there but wrong.
    """
    path = folder / FILE_NAME
    return ModelSettings.model_validate_json(path.read_bytes()) if path.is_file() else ModelSettings()

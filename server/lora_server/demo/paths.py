"""Where the embedded model and its adapters lie in the installed package."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def model_dir() -> Path:
    """Returns the embedded model: a diffusers folder of the classes of Stable Diffusion 3.5."""
    return _ASSETS / "model"


def adapters_dir() -> Path:
    """Returns the folder of the bundled adapters; each sub-folder is one, in PEFT format."""
    return _ASSETS / "adapters"

"""A checkpoint that says how it was trained draws what diffusers draws, configured so by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.config import EngineConfig, ModelConfig
from lora_server.engine.batch_runner import BatchRunner
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.models.schedulers import SCHEDULERS, choose_scheduler, supported
from safetensors.torch import save_file

from tests import original_layout
from tests.parity.harness import Pair, assert_same
from tests.parity.subjects_unet import SDXL, build_sdxl

_VELOCITY = {"prediction_type": "v_prediction"}
_ZERO_SNR = {**_VELOCITY, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_END_IN_NOISE = (
    "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "euler", "euler_ancestral", "lcm", "unipc",
)  # fmt: skip
_EMPTY = torch.tensor([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL whose folder says that it predicts noise."""
    folder = tmp_path_factory.mktemp("declared") / "noise"
    build_sdxl(folder, second_width=24)
    return folder


def _pair(folder: Path, tmp_path: Path, words: dict[str, torch.Tensor], changes: dict[str, Any]) -> Pair:
    """Ours of a file with those *words*, configured by a folder that says otherwise; diffusers' with *changes*."""
    pipeline = SDXL.pipeline(str(folder), torch.float32)
    save_file({**original_layout.of_sdxl(pipeline), **words}, tmp_path / "words.safetensors")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    pipeline.save_pretrained(tmp_path / "by hand")
    pair = Pair(SDXL, str(tmp_path / "by hand"), "float64", tmp_path)
    file = str(tmp_path / "words.safetensors")
    pair.family = load_model(ModelConfig(model=file, config_folder=folder, device="cpu", dtype="float64"))
    pair.runner = BatchRunner(pair.family, EngineConfig())
    return pair


@pytest.mark.parametrize(
    ("words", "changes", "schedulers"),
    [
        ({"v_pred": _EMPTY}, _VELOCITY, (None, "dpmpp_2m")),
        ({"v_pred": _EMPTY, "ztsnr": _EMPTY}, _ZERO_SNR, (None, *_END_IN_NOISE)),
    ],
)
def test_pictures_are_those_of_diffusers_configured_so(
    folder: Path, tmp_path: Path, words: dict[str, torch.Tensor], changes: dict[str, Any], schedulers: tuple[Any, ...]
) -> None:
    """Velocity, and noise levels that end in noise alone; also with the schedulers that requests name."""
    pair = _pair(folder, tmp_path, words, changes)
    drawn = []
    for scheduler in schedulers:
        wanted = SDXL.parameters(scheduler=scheduler)
        drawn.append(pair.draw(wanted, []))
        assert_same(drawn[-1], pair.oracle(wanted, []), torch.float64, scheduler)
    noise = Pair(SDXL, str(folder), "float64", tmp_path).draw(SDXL.parameters(), [])
    assert (noise != drawn[0]).mean() > 0.5


def test_schedulers_that_cannot_end_in_noise_are_not_offered(folder: Path, tmp_path: Path) -> None:
    """They would pass the noise levels over without a word."""
    pair = _pair(folder, tmp_path, {"v_pred": _EMPTY, "ztsnr": _EMPTY}, _ZERO_SNR)
    assert pair.family.info.schedulers == _END_IN_NOISE
    with pytest.raises(ValueError, match="no scheduler 'heun' for this model"):
        choose_scheduler(pair.family._pipeline.scheduler, "heun")  # type: ignore[attr-defined]
    plain = SDXL.pipeline(str(folder), torch.float32).scheduler
    assert supported(plain) == tuple(SCHEDULERS)


def test_a_folder_may_not_choose_such_a_scheduler_either(folder: Path, tmp_path: Path) -> None:
    """In its lora_inference.json."""
    _pair(folder, tmp_path, {"v_pred": _EMPTY, "ztsnr": _EMPTY}, _ZERO_SNR)
    (tmp_path / "by hand" / "lora_inference.json").write_text('{"scheduler": "heun"}')
    with pytest.raises(ModelLoadError, match="heun"):
        load_model(ModelConfig(model=str(tmp_path / "by hand"), device="cpu"))

"""Checkpoints of one file: the original layout, read by diffusers with a local configuration, never by the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.models.base import Conditioning, Prompt
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.types import GenerationParameters
from safetensors.torch import save_file

from tests import original_layout
from tests.parity.subjects_unet import SD1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1.5 as a folder, and beside it as one file."""
    root = tmp_path_factory.mktemp("single")
    SD1.build(root / "model")
    save_file(original_layout.of_sd1(SD1.pipeline(str(root / "model"), torch.float32)), root / "tiny.safetensors")
    for weights in (root / "model").rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".kept"))  # only its configuration is to be read
    return root


def test_a_file_has_the_weights_of_its_folder(folder: Path) -> None:
    """Every tensor of UNet, text encoder and autoencoder arrives where it belongs."""
    family = load_model(ModelConfig(model=str(folder / "tiny.safetensors"), config_folder=folder / "model"))
    assert (family.info.family, family.info.name) == ("sd1", "tiny.safetensors")
    for weights in (folder / "model").rglob("*.kept"):
        weights.rename(weights.with_suffix(".safetensors"))
    expected = load_model(ModelConfig(model=str(folder / "model")))
    for name, module in expected.components.items():
        ours = family.components[name].state_dict()
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(family.decode(latents), expected.decode(latents), rtol=0, atol=0)


def test_without_configuration_the_error_says_what_would_help(folder: Path) -> None:
    """Offline, the message names the repository that the file looks like, and the flag."""
    with pytest.raises(ModelLoadError, match=r"stable-diffusion-v1-5.*--model-config"):
        load_model(ModelConfig(model=str(folder / "tiny.safetensors")))


@pytest.mark.parametrize(("name", "message"), [("absent.safetensors", "no such file"), ("model.ckpt", "pickle")])
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """What is not there, and what could run code, is refused by name."""
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=message):
        load_model(ModelConfig(model=str(tmp_path / name)))


def test_a_file_without_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    """A denoiser alone cannot be served, and the message says what to do."""
    tensors = {n: t for n, t in _original_of(folder).items() if not n.startswith("cond_stage_model.")}
    save_file(tensors, tmp_path / "unet.safetensors")
    with pytest.raises(ModelLoadError, match="lacks weights"):
        load_model(ModelConfig(model=str(tmp_path / "unet.safetensors"), config_folder=folder / "model"))


def _original_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "tiny.safetensors")


def test_an_unknown_pipeline_is_refused_with_the_list_of_what_works(tmp_path: Path) -> None:
    """A folder of a class that nobody knows names those that are known."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "NobodysPipeline"}')
    with pytest.raises(ModelLoadError, match=r"NobodysPipeline.*StableDiffusionXLPipeline"):
        load_model(ModelConfig(model=str(tmp_path)))


def test_a_folder_may_choose_its_defaults(folder: Path) -> None:
    """Scheduler, steps and size of lora_inference.json are what a silent request gets; nonsense is refused."""
    settings = folder / "model" / "lora_inference.json"
    checkpoint = ModelConfig(model=str(folder / "tiny.safetensors"), config_folder=folder / "model")
    try:
        settings.write_text('{"scheduler": "euler", "num_inference_steps": 7, "width_px": 32}')
        family = load_model(checkpoint)
        defaults = family.info.defaults
        assert (defaults.num_inference_steps, defaults.width_px, defaults.height_px) == (7, 32, 64)
        wanted = GenerationParameters("", "", 32, 32, 7, 1.0, 0, 1)
        (state,) = family.begin(wanted, Conditioning(family.encode([Prompt("")])[0], None))
        assert state.remaining_steps == 7  # the folder's own, PNDM, takes 8
        settings.write_text('{"scheduler": "plms"}')
        with pytest.raises(ModelLoadError, match="plms"):
            load_model(checkpoint)
    finally:
        settings.unlink()

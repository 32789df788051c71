"""Checkpoints of one file: the original layout, read by diffusers with a local configuration, never by the hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.models.base import Conditioning, Prompt
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.types import GenerationParameters
from safetensors.torch import save_file

from tests.parity.subjects_unet import SD1

# The tiny SD 1.5 of the parity tests, as its original layout names it: the first pattern that matches is replaced.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k", "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "conv_norm_out": "norm_out",
}  # fmt: skip


def _original(folder: str) -> dict[str, torch.Tensor]:
    """The weights of a folder, under the names of the original layout."""
    pipeline = SD1.pipeline(folder, torch.float32)
    tensors = {f"cond_stage_model.transformer.{name}": t for name, t in pipeline.text_encoder.state_dict().items()}
    if not any(".text_model." in name for name in tensors):  # as the original layout has it
        tensors = {name.replace("transformer.", "transformer.text_model."): t for name, t in tensors.items()}
    for name, tensor in pipeline.unet.state_dict().items():
        for new, old in _UNET.items():
            if name.startswith(f"{new}."):
                rest = name.removeprefix(f"{new}.")
                if ".resnets." in new:
                    rest = re.sub(r"^\w+", lambda match: _RESNET[match[0]], rest)
                tensors[f"model.diffusion_model.{old}.{rest}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{2 - int(match[1])}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"(up|down)\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name).replace("conv_shortcut", "nin_shortcut")
        for new, old in _VAE.items():
            name = name.replace(new, old)
        projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if projection else tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1.5 as a folder, and beside it as one file."""
    root = tmp_path_factory.mktemp("single")
    SD1.build(root / "model")
    save_file(_original(str(root / "model")), root / "tiny.safetensors")
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

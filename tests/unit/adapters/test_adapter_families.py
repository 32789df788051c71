"""Which family an adapter is for: told from names and shapes as the dialects of the field write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_server.adapters.formats.families import family_of, mismatch
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import AdapterIncompatibleError
from lora_server.models.base import adapter_targets

from tests.factories import TinyNet, write_adapter

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
JOINT = "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight"
FILES: dict[str, tuple[dict[str, tuple[int, ...]], str | None]] = {
    "SDXL, PEFT": ({f"base_model.model.{UNET}.lora_A.weight": (4, 2048)}, "sdxl"),
    "SD 1.5, diffusers": ({f"unet.{UNET}.lora.down.weight": (4, 768), f"unet.{UNET}.lora_A.weight": (4, 768)}, "sd1"),
    "SD 2.1, Kohya": ({KOHYA: (4, 1024)}, "sd2"),
    "SDXL, Kohya": ({KOHYA: (4, 2048)}, "sdxl"),
    "SDXL without cross-attention": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_2.lora_down.weight": (4, 2560)},
        "sdxl",
    ),
    "a UNet that does not tell": ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3)}, None),
    "a UNet of unknown width": ({f"{UNET}.lora_A.weight": (4, 32)}, None),
    "FLUX.1, diffusers": ({"transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": (4, 3072)}, "flux"),
    "FLUX.1, Kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "flux"),
    "FLUX.1, joint attention alone": ({JOINT.format(0): (4, 3072)}, "flux"),
    "Qwen-Image": ({JOINT.format(40): (4, 3072)}, "qwen-image"),
    "Qwen-Image, feed-forward": (
        {"transformer_blocks.0.img_mlp.net.2.lora_A.weight": (4, 12288), JOINT.format(0): (4, 3072)},
        "qwen-image",
    ),
    "SD3.5 medium": ({JOINT.format(0): (4, 1536)}, "sd3"),
    "SD3.5 large": ({"transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 2432)}, "sd3"),
    "SD3, ComfyUI": ({"diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": (4, 1536)}, "sd3"),
    "Z-Image": ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 3840)}, "z-image"),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 5120)}, "wan"),
    "nothing known": ({"encoder.layer.0.lora_A.weight": (4, 8)}, None),
}


@pytest.mark.parametrize("case", FILES)
def test_files_tell_their_family(case: str) -> None:
    """Names first, widths where families share their names; what does not tell is not guessed."""
    tensors, family = FILES[case]
    assert family_of(tensors) == family


def test_the_same_family_is_no_mismatch() -> None:
    """Only an adapter that is known to be for another family is called so."""
    tensors = FILES["SDXL, Kohya"][0]
    assert mismatch(tensors, "sdxl") is None
    assert mismatch(tensors, "") is None
    assert mismatch(tensors, "flux") == ("SDXL", "FLUX.1")


def test_an_adapter_for_another_family_names_both(tmp_path: Path) -> None:
    """The refusal says which family the adapter is for and which one is served."""

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 6)})
            self.single_transformer_blocks = torch.nn.ModuleList([block])

    folder = write_adapter(tmp_path / "x", Other())
    files = AdapterFolder(folder, ["net"], AdapterRoots([folder])).read(1 << 20)
    reader = AdapterReader(adapter_targets({"net": TinyNet()}), "net", "tiny", torch.float32, 64, family="sdxl")
    with pytest.raises(AdapterIncompatibleError, match=r"is for FLUX\.1.*is SDXL") as caught:
        reader.read("x", files.contents)
    assert caught.value.metadata["adapter_family"] == "FLUX.1"
    assert caught.value.metadata["model_family"] == "SDXL"

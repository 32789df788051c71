"""The layouts of FLUX and of the U-Nets against diffusers' checkpoint converters, without loading a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from lora_server.adapters.formats.layouts.flux import flux_layout
from lora_server.adapters.formats.layouts.part import Layout, ModuleShape, Shapes
from lora_server.adapters.formats.layouts.unet import unet_layout
from lora_server.adapters.formats.layouts.z_image import z_image_layout
from lora_server.adapters.formats.names import NameTable
from lora_server.models.linear_store import linear_shapes


class Checkpoint(dict[str, torch.Tensor]):
    """An original checkpoint of which only the adapted modules matter: whatever else is asked for is there."""

    def pop(self, key: str, *default: Any) -> torch.Tensor:
        """Removes a tensor, or makes one up."""
        return super().pop(key) if key in self else torch.zeros(4, 1)


def originals(layout: Layout, shapes: Shapes) -> dict[str, torch.Tensor]:
    """A distinct weight for every original module, as large as its parts together."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(sum(shapes[part.path][0] for part in parts), 1, generator=generator)
        for name, parts in layout.items()
    }


def assert_layout(layout: Layout, weights: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]) -> None:
    """Every part is exactly the rows that the converter puts there."""
    for name, parts in layout.items():
        for part in parts:
            rows = part.rows or ((0, len(weights[name])),)
            expected = torch.cat([weights[name][start:stop] for start, stop in rows])
            assert torch.equal(converted[f"{part.path}.weight"], expected), (name, part)


def flux_shapes() -> dict[str, ModuleShape]:
    """FLUX.1-dev with one block of each kind, at its true width (the converter knows no other), one input each."""
    width = 3072
    rows = {"x_embedder": width, "context_embedder": width, "proj_out": 64, "norm_out.linear": 2 * width}
    for embedder in ("timestep_embedder", "text_embedder", "guidance_embedder"):
        rows |= {f"time_text_embed.{embedder}.linear_{n}": width for n in (1, 2)}
    block = {
        "norm1.linear": 6 * width, "norm1_context.linear": 6 * width, "ff.net.0.proj": 4 * width, "ff.net.2": width,
        "ff_context.net.0.proj": 4 * width, "ff_context.net.2": width, "attn.to_out.0": width, "attn.to_add_out": width,
    }  # fmt: skip
    attention = ("attn.to_q", "attn.to_k", "attn.to_v")
    block |= dict.fromkeys((*attention, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), width)
    single = {"norm.linear": 3 * width, "proj_mlp": 4 * width, "proj_out": width, **dict.fromkeys(attention, width)}
    rows |= {f"transformer_blocks.0.{name}": size for name, size in block.items()}
    rows |= {f"single_transformer_blocks.0.{name}": size for name, size in single.items()}
    return {path: ModuleShape(size, 1) for path, size in rows.items()}


def test_flux_layout_is_what_diffusers_converts() -> None:
    """Double and single blocks, the four parts of linear1, the swapped final modulation, the embedders."""
    shapes = flux_shapes()
    layout = {name: parts for name, parts in flux_layout(shapes).items() if ".processor." not in name}
    assert {part.path for parts in layout.values() for part in parts} == set(shapes)
    weights = originals(layout, shapes)
    checkpoint = Checkpoint({f"{name}.weight": weight for name, weight in weights.items()})
    checkpoint |= {f"{name}.bias": weight[:, 0] for name, weight in weights.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint, "the converter knows none of these names"
    assert_layout(layout, weights, converted)


def test_xlabs_processors_are_what_diffusers_converts() -> None:
    """XLabs' processors become the same modules and rows as in diffusers' own converter."""
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    shapes, width = flux_shapes(), 3072
    names = NameTable({"transformer": shapes}, "transformer")
    ups = {
        f"{block}.processor.{half}": torch.randn(width * (3 if "qkv" in half else 1), 2)
        for block, halves in {
            "double_blocks.0": ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"),
            "single_blocks.0": ("qkv_lora", "proj_lora"),
        }.items()
        for half in halves
    }
    file = {f"{name}.up.weight": up for name, up in ups.items()}
    file |= {f"{name}.down.weight": torch.randn(2, 1) for name in ups}
    converted = _convert_xlabs_flux_lora_to_diffusers(dict(file))
    seen = set()
    for name, up in ups.items():
        place = names.place(name.replace("_lora", ""))
        assert place is not None
        for part in place.parts:
            rows = part.rows or ((0, len(up)),)
            expected = converted[f"transformer.{part.path}.lora_B.weight"]
            assert torch.equal(torch.cat([up[start:stop] for start, stop in rows]), expected)
            seen.add(part.path)
    assert {f"transformer.{path}.lora_B.weight" for path in seen} == {key for key in converted if "lora_B" in key}


def test_z_image_layout_is_what_diffusers_converts() -> None:
    """Fused attention in layers and refiners, renamed outputs and embedders."""
    rows = {"cap_embedder.1": 8, "all_x_embedder.2-1": 8, "all_final_layer.2-1.linear": 4}
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"):
        rows |= {f"{block}.attention.{name}": 8 for name in ("to_q", "to_k", "to_v", "to_out.0")}
        rows |= {f"{block}.feed_forward.w1": 24}
    shapes = {path: ModuleShape(size, 1) for path, size in rows.items()}
    layout = z_image_layout(shapes)
    assert {name.rpartition(".")[2] for name in layout} == {"qkv", "out", "x_embedder", "linear"}
    weights = originals(layout, shapes)
    checkpoint = {f"model.diffusion_model.{name}.weight": weight for name, weight in weights.items()}
    assert_layout(layout, weights, convert_z_image_transformer_checkpoint_to_diffusers(checkpoint))


UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 8, 16, 16),
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8, 16),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 56,
    },
}


def unet(kind: str) -> UNet2DConditionModel:
    """A small U-Net with the blocks of a published one."""
    common = {"attention_head_dim": 4, "cross_attention_dim": 8, "norm_num_groups": 4, "layers_per_block": 2}
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, **{**common, **UNETS[kind]})


@pytest.mark.parametrize("kind", UNETS)
def test_unet_layout_is_what_diffusers_converts(kind: str) -> None:
    """Every linear and convolution, down, middle and up, comes to where diffusers' converter puts it."""
    model = unet(kind)
    shapes = {
        path: ModuleShape(module.weight.shape[0], math.prod(module.weight.shape[1:]))
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    layout = unet_layout(shapes)
    assert {part.path for parts in layout.values() for part in parts} == set(shapes)
    weights = originals(layout, shapes)
    prefix = "model.diffusion_model."
    checkpoint = {f"{prefix}{name}.weight": weight for name, weight in weights.items()}
    checkpoint |= {f"{prefix}{name}.bias": weight[:, 0] for name, weight in weights.items()}
    assert_layout(layout, weights, convert_ldm_unet_checkpoint(checkpoint, dict(model.config)))


@pytest.mark.parametrize("kind", UNETS)
def test_kohyas_unet_names(kind: str) -> None:
    """Kohya names SD 1.5 as diffusers does and SDXL as SGM does, with underscores; both reach every linear."""
    shapes = {
        path: ModuleShape(shape.out_features, shape.in_features) for path, shape in linear_shapes(unet(kind)).items()
    }
    names = NameTable({"unet": shapes, "text_encoder": {"text_model.x": ModuleShape(1, 1)}}, "unet")
    original = {parts[0].path: name for name, parts in unet_layout(shapes).items()}
    for path in shapes:
        for name in (path, original[path]):
            place = names.place(f"lora_unet_{name.replace('.', '_')}")
            assert place is not None
            assert (place.component, [part.path for part in place.parts]) == ("unet", [path])
    early = names.place("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    assert early is not None
    assert early.parts[0].path == "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    encoder = names.place("lora_te_text_model_x")
    assert encoder is not None
    assert encoder.component == "text_encoder"


def test_t5_is_where_the_model_has_it() -> None:
    """sd-scripts calls T5 te3 in SD3 and in FLUX, which has it as its second encoder; ComfyUI calls it t5xxl."""
    clip, t5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    encoders = {"text_encoder": {clip: ModuleShape(1, 1)}, "text_encoder_2": {t5: ModuleShape(1, 1)}}
    names = NameTable({"transformer": flux_shapes(), **encoders}, "transformer")
    for name in (f"lora_te3_{t5.replace('.', '_')}", f"text_encoders.t5xxl.transformer.{t5}", f"text_encoder_2.{t5}"):
        place = names.place(name)
        assert place is not None
        assert (place.component, place.parts[0].path) == ("text_encoder_2", t5)
    place = names.place(f"lora_te1_{clip.replace('.', '_')}")
    assert place is not None
    assert place.component == "text_encoder"
    assert names.place("lora_te2_elsewhere") is None


def test_no_two_modules_share_a_name() -> None:
    """With underscores for dots, every name still means one module."""
    sdxl = dict.fromkeys(linear_shapes(unet("SDXL")), ModuleShape(1, 1))
    for shapes, layout in (
        (flux_shapes(), flux_layout),
        (sdxl, unet_layout),
    ):
        dotted = {**layout(shapes), **{path: path for path in shapes}}
        assert len({name.replace(".", "_") for name in dotted}) == len(dotted)

"""The layout in which Black Forest Labs published FLUX.1, which Kohya, XLabs, ComfyUI and BFL name modules by.

The source of truth is diffusers' `convert_flux_transformer_checkpoint_to_diffusers`, against which a test holds this
table. XLabs' processors are named as in diffusers' `_convert_xlabs_flux_lora_to_diffusers` (`qkv_lora1.down` is the
down half of `qkv1` in the grammar of `keys`).
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_server.adapters.formats.layouts.part import Layout, Part, Shapes, fused, swapped

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "processor.proj1": "attn.to_out.0",
    "processor.proj2": "attn.to_add_out",
}
_DOUBLE_FUSED: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.qkv1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.qkv2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear", "processor.proj": "proj_out"}
_SINGLE_FUSED: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "processor.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
}


def flux_layout(shapes: Shapes) -> Layout:
    """Names every module of a FLUX.1 transformer as the original does; empty for another family."""
    singles = _numbers(shapes, "single_transformer_blocks.")
    if not singles or "single_transformer_blocks.0.proj_mlp" not in shapes or "context_embedder" not in shapes:
        return {}
    layout: dict[str, tuple[Part, ...]] = {name: (Part(path),) for name, path in _OUTSIDE.items() if path in shapes}
    layout["final_layer.adaLN_modulation.1"] = swapped(shapes, "norm_out.linear")
    blocks = [
        ("double_blocks", "transformer_blocks", n, _DOUBLE, _DOUBLE_FUSED)
        for n in _numbers(shapes, "transformer_blocks.")
    ]
    blocks += [("single_blocks", "single_transformer_blocks", n, _SINGLE, _SINGLE_FUSED) for n in singles]
    for theirs, ours, number, plain, together in blocks:
        for name, path in plain.items():
            if f"{ours}.{number}.{path}" in shapes:
                layout[f"{theirs}.{number}.{name}"] = (Part(f"{ours}.{number}.{path}"),)
        for name, paths in together.items():
            layout[f"{theirs}.{number}.{name}"] = fused(shapes, tuple(f"{ours}.{number}.{path}" for path in paths))
    return {name: parts for name, parts in layout.items() if parts}


def _numbers(shapes: Shapes, prefix: str) -> list[int]:
    found = {path.removeprefix(prefix).partition(".")[0] for path in shapes if path.startswith(prefix)}
    return sorted(int(number) for number in found if number.isdigit())

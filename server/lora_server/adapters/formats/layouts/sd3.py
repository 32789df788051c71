"""The layout in which Stability published SD3 and SD3.5, which Kohya, ComfyUI and others name modules by.

The source of truth is diffusers' `convert_sd3_transformer_checkpoint_to_diffusers`, against which a test holds this
table. diffusers' own adapter loader converts nothing for SD3 (it warns, and the picture stays the base's).

| original | with us | |
|---|---|---|
| `attn.qkv` | `to_q`, `to_k`, `to_v` | rows in this order |
| `final_layer.adaLN_modulation.1` | `norm_out.linear` | shift, scale there; scale, shift here |
| last block's `context_block.adaLN_modulation.1` | `norm1_context.linear` | the same swap |
| every other modulation | `norm1.linear`, `norm1_context.linear` | as it is |
"""

from __future__ import annotations

import re

from lora_server.adapters.formats.layouts.part import Layout, Part, Shapes, fused, swapped

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_IN_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_ATTENTIONS = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SPLIT_NAMES = (("q", "k", "v"), ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))


def sd3_layout(shapes: Shapes) -> Layout:
    """Names every module of an SD3 transformer as the original does; empty for another family."""
    blocks = {
        int(match[1]) for path in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.norm1_context\.", path))
    }
    if (
        not blocks
        or "context_embedder" not in shapes
        or any(p.startswith("single_transformer_blocks.") for p in shapes)
    ):
        return {}
    layout: dict[str, tuple[Part, ...]] = {
        original: (Part(path),) for original, path in _OUTSIDE.items() if path in shapes
    }
    layout["final_layer.adaLN_modulation.1"] = swapped(shapes, "norm_out.linear")
    for block in blocks:
        ours, theirs = f"transformer_blocks.{block}.", f"joint_blocks.{block}."
        for original, path in _IN_BLOCK.items():
            if ours + path in shapes:
                layout[theirs + original] = (Part(ours + path),)
        for original, names in _ATTENTIONS.items():
            paths = tuple(ours + name for name in names)
            layout[f"{theirs}{original}.qkv"] = fused(shapes, paths)
            for split in _SPLIT_NAMES:
                layout |= {
                    f"{theirs}{original}.{name}": (Part(path),)
                    for name, path in zip(split, paths, strict=True)
                    if path in shapes
                }
        context = f"{ours}norm1_context.linear"
        last = block == max(blocks)
        layout[f"{theirs}context_block.adaLN_modulation.1"] = swapped(shapes, context) if last else (Part(context),)
    return {original: parts for original, parts in layout.items() if parts}

"""The layout in which Z-Image was published, which ComfyUI names modules by.

The source of truth is diffusers' `convert_z_image_transformer_checkpoint_to_diffusers`, against which a test holds
this table.
"""

from __future__ import annotations

from lora_server.adapters.formats.layouts.part import Layout, Part, Shapes, fused

_RENAMED = (("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1", "x_embedder"))
_TO_OUT, _TO_Q = ".attention.to_out.0", ".attention.to_q"


def z_image_layout(shapes: Shapes) -> Layout:
    """Names every module of a Z-Image transformer as the original does; empty for another family."""
    if not any(path.startswith("context_refiner.") for path in shapes) or "cap_embedder.1" not in shapes:
        return {}
    layout: dict[str, tuple[Part, ...]] = {}
    for path in shapes:
        name = path
        for ours, theirs in _RENAMED:
            name = name.replace(ours, theirs)
        if path.endswith(_TO_OUT):
            name = path.removesuffix(_TO_OUT) + ".attention.out"
        if name != path:
            layout[name] = (Part(path),)
        if path.endswith(_TO_Q):
            attention = path.removesuffix("to_q")
            layout[f"{attention}qkv"] = fused(shapes, tuple(f"{attention}to_{part}" for part in "qkv"))
    return {name: parts for name, parts in layout.items() if parts}

"""The layout in which Stable Diffusion 1, 2 and XL were published (LDM, SGM), which A1111 and Kohya's SDXL use.

The source of truth is diffusers' `convert_ldm_unet_checkpoint`, against which a test holds this table. Works for any
number of levels and of layers a level, which it reads off the module paths.
"""

from __future__ import annotations

import re

from lora_server.adapters.formats.layouts.part import Layout, Part, Shapes

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_layout(shapes: Shapes) -> Layout:
    """Names every module of a conditional U-Net as LDM and SGM do; empty for another family."""
    layers = {
        match[4] for path in shapes if (match := _BLOCK.fullmatch(path)) and path.startswith("down_blocks.0.resnets")
    }
    if not layers:
        return {}
    with_attention = {path.split(".")[1] for path in shapes if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    return {
        name: (Part(path),) for path in shapes if (name := _original(path, len(layers), with_attention)) is not None
    }


def _original(path: str, layers: int, with_attention: set[str]) -> str | None:
    """The original name of one module; None if it has none."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if middle := _MIDDLE.fullmatch(path):
        kind, number, rest = middle.groups()
        place = 2 * int(number) if kind == "resnets" else 2 * int(number) + 1
        return _join(f"middle_block.{place}", kind, rest)
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    side, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if match[2] in with_attention else 1}.conv"
    block = (
        f"input_blocks.{level * (layers + 1) + number + 1}"
        if side == "down"
        else f"output_blocks.{level * (layers + 1) + number}"
    )
    return _join(f"{block}.{0 if kind == 'resnets' else 1}", kind, rest)


def _join(block: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{block}.{rest}"
    return f"{block}.{_RESNET[rest]}" if rest in _RESNET else None

"""Which model family an adapter was trained for, told from the names and shapes of its tensors alone.

Pure functions of what a file's header says, so that a refusal costs no load. Names come in every dialect (dots or
underscores, diffusers' names or the original ones): only what all of them share is looked at. What a file says in
words is the business of `declared`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Shape = tuple[int, ...]

NAMES: Mapping[str, str] = {
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sd3": "SD3 / SD3.5",
    "sdxl": "SDXL",
    "sdxl-refiner": "SDXL refiner",
    "wan": "Wan",
    "z-image": "Z-Image",
}
"""Families by `ModelInfo.family`, as people call them."""

_TELLTALES = (
    ("flux2", r"to_qkv_mlp_proj|(double|single)_stream_modulation|blocks_\d+_ff(_context)?_linear_(in|out)"),
    ("qwen-image", r"transformer_blocks_\d+_(img|txt)_(mlp|mod)"),
    ("z-image", r"(^|_)layers_\d+_(attention_(to_[qkv]|qkv|out)|feed_forward_w[123])|noise_refiner_\d+_attention_"),
    ("flux", r"single_transformer_blocks_\d+|double_blocks_\d+_(img|txt)_|single_blocks_\d+_(linear|modulation)"),
    ("sd3", r"joint_blocks_\d+|transformer_blocks_\d+_attn2_to_\w+_lora|transformer_blocks_\d+_attn_add_[qkv]_proj"),
    ("wan", r"(^|_)blocks_\d+_(self|cross)_attn_"),
)
"""By names; the first that any tensor matches, of those that no other family has."""
_UNET = re.compile(r"(down_blocks|up_blocks|input_blocks|output_blocks)_\d+_|mid_block_|middle_block_")
_DEEP = re.compile(r"(attentions_\d+|(input|output)_blocks_\d+_1|middle_block_1)_transformer_blocks_[1-9]")
_TEXT_INPUT = re.compile(r"attn2_to_[kv]_\w*(lora_A|lora_down|hada_w1_b|hada_w2_b)", re.IGNORECASE)
_UNET_TEXT = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
_JOINT = re.compile(r"transformer_blocks_(\d+)_attn_(to_[qkv]|add_[qkv]_proj)_\w*(lora_a|lora_down)(_|$)", re.I)
_BFL = re.compile(r"(double_blocks_\d+_(img|txt)_attn_qkv|single_blocks_\d+_linear1)_\w*(lora_a|lora_down)(_|$)", re.I)
_FLUX2_WIDTHS = {4096, 6144}
"""Of klein 9B and dev; klein 4B is as wide as FLUX.1."""
_JOINT_WIDTHS = {1536: "sd3", 2432: "sd3", 3072: "flux"}
_FLUX_BLOCKS = 19
"""Joint blocks of FLUX.1; Qwen-Image has 60 of the same width."""


def family_of(tensors: Mapping[str, Shape]) -> str | None:
    """Returns the family that tensors of these names and shapes belong to; None if they do not tell."""
    names = {re.sub(r"\W", "_", key): shape for key, shape in tensors.items()}
    if any(_UNET.search(name) for name in names):
        return _unet(names)
    joint = [(int(m[1]), shape) for name, shape in names.items() if len(shape) > 1 and (m := _JOINT.search(name))]
    telling = (family for family, mark in _TELLTALES if any(re.search(mark, name) for name in names))
    found = next(telling, None)
    if found == "flux" and any(_is_of_flux2(name, shape) for name, shape in names.items()):
        return "flux2"
    if found not in (None, "sd3") or not joint:
        return found
    widths = {shape[-1] for _, shape in joint}
    if widths == {3072}:
        return "qwen-image" if max(block for block, _ in joint) >= _FLUX_BLOCKS else "flux"
    return _JOINT_WIDTHS.get(widths.pop(), found) if len(widths) == 1 else found


def _is_of_flux2(name: str, shape: Shape) -> bool:
    """Whether a tensor with a name of FLUX.1, which FLUX.2 shares, is as wide as FLUX.2 is."""
    return len(shape) > 1 and shape[1] in _FLUX2_WIDTHS and _BFL.search(name) is not None


def _unet(names: Mapping[str, Shape]) -> str | None:
    """By the width of the text that cross-attention reads, else by the depth of the transformers."""
    widths = {shape[1] for name, shape in names.items() if _TEXT_INPUT.search(name) and len(shape) > 1}
    if len(widths) == 1 and (family := _UNET_TEXT.get(widths.pop())):
        return family
    return "sdxl" if any(_DEEP.search(name) for name in names) else None


def mismatch(tensors: Mapping[str, Shape], served: str) -> tuple[str, str] | None:
    """Returns the names of the adapter's family and of the *served* one if they differ; None if nothing tells so."""
    found = family_of(tensors)
    if found is None or found == served or not served:
        return None
    return NAMES[found], NAMES.get(served, served)

"""Tiny Stable Diffusion pipelines of diffusers as checkpoints of one file, in the layout of the original authors."""

from __future__ import annotations

import re
from typing import Any

import torch

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k", "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "conv_norm_out": "norm_out",
}  # fmt: skip
_OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def of_sd1(pipeline: Any) -> Tensors:
    """The weights of an SD 1.x."""
    tensors = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in _clip(pipeline.text_encoder).items()}
    return _own({**tensors, **_unet(pipeline.unet), **_autoencoder(pipeline.vae)})


def of_sdxl(pipeline: Any) -> Tensors:
    """The weights of an SDXL, whose text encoders must differ in width."""
    first = {f"conditioner.embedders.0.transformer.{name}": each for name, each in _clip(pipeline.text_encoder).items()}
    second = {
        f"conditioner.embedders.1.model.{name}": each for name, each in _open_clip(pipeline.text_encoder_2).items()
    }
    return _own({**first, **second, **_unet(pipeline.unet), **_autoencoder(pipeline.vae)})


def _own(tensors: Tensors) -> Tensors:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _clip(encoder: Any) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": each for name, each in encoder.state_dict().items()}


def _open_clip(encoder: Any) -> Tensors:
    text = {name.removeprefix("text_model."): each for name, each in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "text_projection": text["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = text[f"final_layer_norm.{kind}"]
        for k in range(encoder.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{k}.", f"transformer.resblocks.{k}."
            heads = [text[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(heads)
            tensors |= {f"{theirs}{old}.{kind}": text[f"{ours}{new}.{kind}"] for new, old in _OPEN_CLIP.items()}
    return tensors


def _unet(unet: Any) -> Tensors:
    return {f"model.diffusion_model.{_unet_name(name, unet)}": each for name, each in unet.state_dict().items()}


def _unet_name(name: str, unet: Any) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}.{_in_block(ours, name.removeprefix(f'{ours}.'))}"
    layers = unet.config.layers_per_block
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert match is not None
    way, block, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if way == "down":
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{block * (layers + 1) + layer + 1}.{int(part == 'attentions')}.{_in_block(part, rest)}"
    if part == "upsamplers":
        attends = "CrossAttn" in unet.config.up_block_types[block]
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends}.{rest}"
    return f"output_blocks.{block * (layers + 1) + layer}.{int(part == 'attentions')}.{_in_block(part, rest)}"


def _in_block(part: str, rest: str) -> str:
    return re.sub(r"^\w+", lambda match: _RESNET[match[0]], rest) if "resnets" in part else rest


def _autoencoder(vae: Any) -> Tensors:
    tensors, last = {}, len(vae.config.up_block_types) - 1
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"(up|down)\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name).replace("conv_shortcut", "nin_shortcut")
        for new, old in _VAE.items():
            name = name.replace(new, old)
        projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if projection else tensor
    return tensors

"""Tiny Stable Diffusion pipelines of diffusers as checkpoints of one file, in the layout of the original authors.

For UNets of two levels and one residual block a level, as tests/parity/subjects_unet.py builds them.
"""

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
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
    tensors = {}
    for name, tensor in unet.state_dict().items():
        for new, old in _UNET.items():
            if name.startswith(f"{new}."):
                rest = name.removeprefix(f"{new}.")
                if ".resnets." in new:
                    rest = re.sub(r"^\w+", lambda match: _RESNET[match[0]], rest)
                tensors[f"model.diffusion_model.{old}.{rest}"] = tensor
    return tensors


def _autoencoder(vae: Any) -> Tensors:
    tensors = {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{2 - int(match[1])}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"(up|down)\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name).replace("conv_shortcut", "nin_shortcut")
        for new, old in _VAE.items():
            name = name.replace(new, old)
        projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if projection else tensor
    return tensors

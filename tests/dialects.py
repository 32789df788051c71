"""Adapters in the dialects of the wild, written by scripts that follow each dialect's published key names.

Nothing here knows the server's tables: names are spelled out as the trainers spell them, and what a file means for the
model's weights is worked out through diffusers' own checkpoint converters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


@dataclass
class Written:
    """A file's tensors, and the delta that it stands for, by the original module's name."""

    tensors: Tensors = field(default_factory=dict)
    deltas: Tensors = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Writes the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in self.tensors.items()}
        save_file(tensors, path, self.metadata | dict(metadata or {}))
        return path


def original_sd3(hidden: int, blocks: int, dual: set[int], context: int, text: int) -> Tensors:
    """A random SD3.5 checkpoint as Stability names it: what `convert_sd3_transformer_checkpoint_to_diffusers` takes."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (hidden, 16, 2, 2),
        "t_embedder.mlp.0.weight": (hidden, 256),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "y_embedder.mlp.0.weight": (hidden, text),
        "y_embedder.mlp.2.weight": (hidden, hidden),
        "context_embedder.weight": (hidden, context),
        "final_layer.linear.weight": (64, hidden),
        "final_layer.adaLN_modulation.1.weight": (2 * hidden, hidden),
    }
    for block in range(blocks):
        last = block == blocks - 1
        for side in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{side}"
            shapes[f"{name}.attn.qkv.weight"] = (3 * hidden, hidden)
            width = 9 if side == "x_block" and block in dual else 2 if side == "context_block" and last else 6
            shapes[f"{name}.adaLN_modulation.1.weight"] = (width * hidden, hidden)
            if side == "x_block" and block in dual:
                shapes[f"{name}.attn2.qkv.weight"] = (3 * hidden, hidden)
                shapes[f"{name}.attn2.proj.weight"] = (hidden, hidden)
            if side == "x_block" or not last:
                shapes[f"{name}.attn.proj.weight"] = (hidden, hidden)
                shapes[f"{name}.mlp.fc1.weight"] = (4 * hidden, hidden)
                shapes[f"{name}.mlp.fc2.weight"] = (hidden, 4 * hidden)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    biases = {name.replace(".weight", ".bias"): value.flatten(1)[:, 0] for name, value in weights.items()}
    return {"pos_embed": torch.zeros(1, 4, hidden), **weights, **biases}


def write_lora(
    modules: Mapping[str, tuple[int, ...]],
    name_of: Callable[[str, str], str],
    *,
    rank_of: Callable[[str], int] = lambda _: 4,
    alpha_of: Callable[[str], float | None] = lambda _: 2.0,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """LoRA of *modules*, by name and weight shape; *name_of* gives a key from a module and one of down, up, alpha."""
    written = Written()
    generator = torch.Generator().manual_seed(1)
    for module, shape in modules.items():
        rank, alpha = rank_of(module), alpha_of(module)
        down = (torch.randn((rank, *shape[1:]), generator=generator) * 0.1).to(dtype)
        up_shape = (shape[0], rank, *[1] * (len(shape) - 2))
        up = (torch.randn(up_shape, generator=generator) * 0.1).to(dtype)
        written.tensors[name_of(module, "down")] = down
        written.tensors[name_of(module, "up")] = up
        if alpha is not None:
            written.tensors[name_of(module, "alpha")] = torch.tensor(alpha, dtype=torch.float32)
        scaling = 1.0 if alpha is None else alpha / rank
        product = up.double().flatten(1) @ down.double().flatten(1)
        written.deltas[module] = (product * scaling).view(shape)
    return written


def kohya(prefix: str) -> Callable[[str, str], str]:
    """sd-scripts: `lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight`, and `.alpha`."""
    suffixes = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}
    return lambda module, half: f"{prefix}_{module.replace('.', '_')}{suffixes[half]}"


def dotted(prefix: str, down: str, up: str) -> Callable[[str, str], str]:
    """ComfyUI, ai-toolkit, diffusers: `diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight`."""
    suffixes = {"down": f".{down}.weight", "up": f".{up}.weight", "alpha": ".alpha"}
    return lambda module, half: f"{prefix}{module}{suffixes[half]}"

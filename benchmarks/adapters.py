"""Random adapters in PEFT format, of the ranks and numbers that the workloads ask for, written once."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lora_server.models.weights import AdapterTargets
from safetensors.torch import save_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def write_adapters(
    folder: Path, targets: AdapterTargets, count: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> list[Path]:
    """Writes *count* adapters for all attention projections of the denoiser, of the ranks in turn; keeps what is there.

    Every adapter has the numbers of the first of its rank, but for one, so that digests differ and writing is quick.
    """
    denoiser = "transformer" if "transformer" in targets else "unet"
    shapes = {path: shape for path, shape in targets[denoiser].items() if path.endswith(ATTENTION)}
    stock: dict[int, dict[str, torch.Tensor]] = {}
    paths = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        path = folder / f"r{rank}-{index:04d}"
        paths.append(path)
        if (path / "adapter_model.safetensors").is_file():
            continue
        if rank not in stock:
            stock[rank] = {}
            for name, shape in shapes.items():
                prefix = f"base_model.model.{name}"
                stock[rank][f"{prefix}.lora_A.weight"] = (torch.randn(rank, shape.in_features) * 0.02).to(dtype)
                stock[rank][f"{prefix}.lora_B.weight"] = (torch.randn(shape.out_features, rank) * 0.02).to(dtype)
        next(iter(stock[rank].values()))[0, 0] = index / 4096
        path.mkdir(parents=True, exist_ok=True)
        save_file(stock[rank], path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION)}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths

"""Pictures with files of the wild equal diffusers' pictures with the same change made to the weights by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.demo.paths import model_dir
from lora_server.types import ApplicationWay

from tests.dialects import Tensors, Written, dotted, kohya, write_lora
from tests.parity.harness import Pair
from tests.parity.subjects_sd3 import SD3
from tests.unit.adapters.test_dialects import own_modules, sd3_modules, through_diffusers

HIDDEN = 160
By = dict[str, Tensors]
"""What to add to the weights, by component and path."""


def pipeline() -> Any:
    """diffusers' own, in float64."""
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(model_dir(), dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def kohya_file() -> tuple[Written, By]:
    """Every linear of the transformer and some of CLIP-L, in one file of sd-scripts."""
    transformer = write_lora(sd3_modules(), kohya("lora_unet"))
    text = write_lora(own_modules("text_encoder", "q_proj", "fc1"), kohya("lora_te1"))
    by = {"transformer": through_diffusers(transformer.deltas), "text_encoder": text.deltas}
    return Written({**transformer.tensors, **text.tensors}), by


def comfyui_file() -> tuple[Written, By]:
    """Fused projections and the modulations whose halves are swapped, as ComfyUI names them."""
    modules = {name: shape for name, shape in sd3_modules().items() if "qkv" in name or "adaLN" in name}
    written = write_lora(modules, dotted("diffusion_model.", "lora_A", "lora_B"))
    return written, {"transformer": through_diffusers(written.deltas)}


def loha_file() -> tuple[Written, By]:
    """LyCORIS' LoHa of rank 3 on the fused projections: a LoRA of rank 9."""
    generator = torch.Generator().manual_seed(4)
    written = Written()
    for name, (rows, columns) in ((name, shape) for name, shape in sd3_modules().items() if name.endswith("attn.qkv")):
        halves = [torch.randn(size, generator=generator) * 0.3 for size in ((rows, 3), (3, columns)) * 2]
        keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        prefix = f"lora_unet_{name.replace('.', '_')}"
        written.tensors |= {f"{prefix}.{key}": half for key, half in zip(keys, halves, strict=True)}
        written.tensors[f"{prefix}.alpha"] = torch.tensor(1.5)
        a, b, c, d = (half.double() for half in halves)
        written.deltas[name] = 0.5 * (a @ b) * (c @ d)
    return written, {"transformer": through_diffusers(written.deltas)}


def lokr_file() -> tuple[Written, By]:
    """LyCORIS' LoKr of two whole matrices, on feed-forwards: of full rank, so merged only."""
    generator = torch.Generator().manual_seed(5)
    written = Written()
    for name, (rows, columns) in ((name, shape) for name, shape in sd3_modules().items() if name.endswith("mlp.fc1")):
        first, second = (torch.randn(s, generator=generator) * 0.1 for s in ((16, 16), (rows // 16, columns // 16)))
        prefix = f"lora_unet_{name.replace('.', '_')}"
        written.tensors |= {
            f"{prefix}.lokr_w1": first,
            f"{prefix}.lokr_w2": second,
            f"{prefix}.alpha": torch.tensor(9.0),
        }
        written.deltas[name] = torch.kron(first.double(), second.double())
    return written, {"transformer": through_diffusers(written.deltas)}


def dora_file() -> tuple[Written, By]:
    """sd-scripts' names with `dora_scale` on fused projections: each row has its own norm, with its base weights."""
    generator = torch.Generator().manual_seed(6)
    transformer = pipeline().transformer
    modules = {f"joint_blocks.{n}.x_block.attn.qkv": (3 * HIDDEN, HIDDEN) for n in range(6)}
    written = write_lora(modules, kohya("lora_unet"))
    by: Tensors = {}
    for n, name in enumerate(modules):
        magnitude = torch.rand((3 * HIDDEN, 1), generator=generator) + 0.5
        written.tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude
        paths = [f"transformer_blocks.{n}.attn.to_{part}" for part in "qkv"]
        base = torch.cat([transformer.get_submodule(path).weight.detach() for path in paths])
        changed = base + written.deltas[name]
        delta = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - base
        by |= dict(zip(paths, delta.chunk(3), strict=True))
    return written, {"transformer": by}


def patterns_file() -> tuple[Written, By]:
    """diffusers' header with alphas by pattern for CLIP, and compiled blocks' wrapper in the denoiser's names."""
    paths = own_modules("text_encoder", "q_proj", "fc1")
    text = write_lora(paths, dotted("text_encoder.", "lora_A", "lora_B"), alpha_of=lambda _: None)
    strong = [path for path in paths if ".layers.1." in path]
    alphas = {rf"^{path.replace('.', chr(92) + '.')}": 40.0 for path in strong}
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": alphas, "target_modules": list(paths)}
    blocks = own_modules("transformer", "attn.to_q", "attn.to_v")
    name_of = dotted("transformer.", "lora_A", "lora_B")
    wrapped = write_lora(
        blocks, lambda name, half: name_of(name.replace(".attn.", "._orig_mod.attn."), half), alpha_of=lambda _: None
    )
    by = {"transformer": wrapped.deltas, "text_encoder": text.deltas | {p: 10 * text.deltas[p] for p in strong}}
    header = {"lora_adapter_metadata": json.dumps({f"text_encoder.{key}": value for key, value in config.items()})}
    return Written({**wrapped.tensors, **text.tensors}, metadata=header), by


FILES: dict[str, tuple[Callable[[], tuple[Written, By]], bool]] = {
    "kohya": (kohya_file, True),
    "comfyui": (comfyui_file, True),
    "loha": (loha_file, True),
    "lokr": (lokr_file, False),
    "dora": (dora_file, False),
    "patterns and wrappers": (patterns_file, True),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One for all cases, in float64."""
    return Pair(SD3, "demo", "float64", tmp_path_factory.mktemp("dialects"))


def by_hand(changes: By, scale: float) -> np.ndarray:
    """The picture of a pipeline whose weights have been added to."""
    loaded = pipeline()
    for component, deltas in changes.items():
        for path, delta in deltas.items():
            loaded.components[component].get_submodule(path).weight.data += scale * delta
    wanted = SD3.parameters(num_inference_steps=2)
    latents = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(wanted.seed))
    images = loaded(
        wanted.prompt, negative_prompt="", height=128, width=128, num_inference_steps=2, guidance_scale=4.0,
        latents=latents.double(), max_sequence_length=20, output_type="np",
    ).images  # fmt: skip
    return (images * 255).round().astype(np.uint8)


@pytest.mark.parametrize("case", FILES)
def test_pictures_equal_the_same_delta_by_hand(case: str, house: Pair) -> None:
    """Every value is equal after rounding to 8 bits, merged and, where there is a low-rank form, from the pages."""
    make, uses_slots = FILES[case]
    written, changes = make()
    written.save(house.root / f"{case}.safetensors")
    wanted, uses = SD3.parameters(num_inference_steps=2), [(f"{case}.safetensors", 0.8)]
    expected = by_hand(changes, 0.8)
    np.testing.assert_array_equal(house.draw(wanted, uses), expected)
    assert np.abs(house.draw(wanted, []).astype(int) - expected).mean() > 1, "the adapter would not be seen"
    assert house.runner.phases([house.adapter(*uses[0])], 1)[0].takes_slots == uses_slots
    if uses_slots:
        np.testing.assert_array_equal(house.draw(wanted, uses, ApplicationWay.SLOTS), expected)

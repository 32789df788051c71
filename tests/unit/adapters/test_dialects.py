"""Every dialect's file means the same change of the weights as diffusers' own converters say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.adapters.formats.reader import AdapterReader, ReadAdapter
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.demo.paths import model_dir
from lora_server.models.base import adapter_targets
from lora_server.models.weights import AdapterTargets, linear_groups

from tests.dialects import Written, dotted, kohya, original_sd3, write_lora

HIDDEN, BLOCKS, DUAL = 160, 6, {0, 1, 2}


@cache
def components() -> dict[str, torch.nn.Module]:
    """The embedded model's components."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(model_dir(), use_safetensors=True)
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: getattr(pipeline, name).double() for name in names}


@cache
def targets() -> AdapterTargets:
    """What adapters may change of it."""
    return adapter_targets(components())


def read(path: Path, *, partial: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> ReadAdapter:
    """Reads a folder or file for the embedded model, in float64."""
    reader = AdapterReader(targets(), "transformer", "demo", dtype, 256, **options)
    files = AdapterFolder(path, sorted(targets()), AdapterRoots([path])).read(1 << 30)
    return reader.read_planned(path.name, files.contents, allow_partial=partial)


def deltas(found: ReadAdapter, component: str = "transformer") -> dict[str, torch.Tensor]:
    """The change of each weight at scale 1, by path, formulas worked out on the embedded model's weights."""
    groups = linear_groups(targets()[component])
    changes = {
        groups[delta.group].paths[member]: delta.b[k] @ delta.a[k]
        for delta in found.weights.groups.get(component, ())
        for k, member in enumerate(delta.members)
    }
    for each in found.weights.formulas.get(component, ()):
        path = groups[each.group].paths[each.member]
        weight = components()[component].get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        changes[path] = each.formula.delta(weight.detach())
    return changes


def sd3_modules() -> dict[str, tuple[int, ...]]:
    """Every linear of the embedded transformer by its original name, with its shape."""
    original = original_sd3(HIDDEN, BLOCKS, DUAL, 96, 96)
    return {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in original.items()
        if name.endswith(".weight") and "x_embedder" not in name
    }


def through_diffusers(changes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What changes of an original SD3 checkpoint are in diffusers' layout, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    before = original_sd3(HIDDEN, BLOCKS, DUAL, 96, 96)
    after = {
        name: value + changes.get(name.removesuffix(".weight"), 0) if name.endswith(".weight") else value
        for name, value in before.items()
    }
    old, new = convert(dict(before)), convert(dict(after))
    found = {name.removesuffix(".weight"): new[name] - old[name] for name in old if name.endswith(".weight")}
    return {name: change for name, change in found.items() if change.any()}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same modules change by the same amounts; adding and subtracting weights costs the oracle some digits."""
    assert set(found) == set(expected)
    for path, change in expected.items():
        torch.testing.assert_close(found[path], change.flatten(1), rtol=0, atol=1e-12)


ORIGINAL_NAMES = {
    "kohya": kohya("lora_unet"),
    "comfyui": dotted("diffusion_model.", "lora_A", "lora_B"),
    "comfyui with lora_up": dotted("model.diffusion_model.", "lora_down", "lora_up"),
}


@pytest.mark.parametrize("dialect", ORIGINAL_NAMES)
def test_original_names_change_what_diffusers_converter_says(tmp_path: Path, dialect: str) -> None:
    """Every linear of SD3.5 under its original name, fused qkv and swapped modulations too, mixed ranks and alphas."""
    written = write_lora(
        sd3_modules(),
        ORIGINAL_NAMES[dialect],
        rank_of=lambda m: 2 if "mlp" in m else 4,
        alpha_of=lambda m: 3.0 if "attn" in m else 1.0,
    )
    found = read(written.save(tmp_path / "x.safetensors"))
    assert found.plan.dialect == dialect.partition(" ")[0]
    assert_same(deltas(found), through_diffusers(written.deltas))


@pytest.mark.parametrize("names", [("q", "k", "v"), ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")])
def test_split_qkv_in_original_blocks(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """Trainers that split the fused projection name its thirds; each goes to its own module."""
    modules = {f"joint_blocks.1.x_block.attn.{name}": (HIDDEN, HIDDEN) for name in names}
    written = write_lora(modules, dotted("diffusion_model.", "lora_A", "lora_B"))
    expected = {
        f"transformer_blocks.1.attn.{ours}": change
        for ours, change in zip(("to_q", "to_k", "to_v"), written.deltas.values(), strict=True)
    }
    assert_same(deltas(read(written.save(tmp_path / "x.safetensors"))), expected)


def own_modules(component: str, *endings: str) -> dict[str, tuple[int, ...]]:
    """Modules of the embedded model by their own names."""
    shapes = targets()[component]
    return {p: (s.out_features, s.in_features) for p, s in shapes.items() if p.endswith(endings)}


OWN_NAMES = {
    "diffusers": (dotted("transformer.", "lora_A", "lora_B"), {}),
    "diffusers before peft": (dotted("transformer.", "lora.down", "lora.up"), {}),
    "ai-toolkit": (dotted("transformer.", "lora_A", "lora_B"), {"software": json.dumps({"name": "ai-toolkit"})}),
    "onetrainer": (kohya("lora_transformer"), {}),
    "comfyui": (dotted("diffusion_model.", "lora_A", "lora_B"), {}),
}


@pytest.mark.parametrize("dialect", OWN_NAMES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_names(tmp_path: Path, dialect: str, alpha: float | None) -> None:
    """Module names as diffusers has them; a missing alpha is the rank."""
    name_of, metadata = OWN_NAMES[dialect]
    written = write_lora(own_modules("transformer", ""), name_of, alpha_of=lambda _: alpha)
    found = read(written.save(tmp_path / "x.safetensors", metadata))
    assert found.plan.dialect == dialect.partition(" ")[0]
    assert_same(deltas(found), written.deltas)


TEXT_ENCODERS = {
    "kohya": {
        "text_encoder": kohya("lora_te1"),
        "text_encoder_2": kohya("lora_te2"),
        "text_encoder_3": kohya("lora_te3"),
    },
    "comfyui": {
        f"text_encoder{number}": dotted(f"text_encoders.{name}.transformer.", "lora_down", "lora_up")
        for number, name in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5xxl"))
    },
    "diffusers": {
        name: dotted(f"{name}.", "lora_linear_layer.down", "lora_linear_layer.up")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    },
}


@pytest.mark.parametrize("dialect", TEXT_ENCODERS)
def test_text_encoders(tmp_path: Path, dialect: str) -> None:
    """CLIP-L, CLIP-G and T5 under each dialect's names reach the component that they are."""
    written, everything = {}, Written()
    for component, name_of in TEXT_ENCODERS[dialect].items():
        written[component] = write_lora(own_modules(component, "q_proj", "fc1", ".q", ".wi_0"), name_of)
        everything.tensors |= written[component].tensors
    found = read(everything.save(tmp_path / "x.safetensors"))
    for component, part in written.items():
        assert part.deltas
        assert_same(deltas(found, component), part.deltas)


def test_diffusers_own_writer(tmp_path: Path) -> None:
    """A folder of `save_lora_weights` with the metadata header: alpha, patterns and rsLoRA come from there."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    transformer = StableDiffusion3Pipeline.from_pretrained(model_dir()).transformer
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2},
        alpha_pattern={"transformer_blocks.0.attn.to_q": 3}, init_lora_weights=False,
    )  # fmt: skip
    wrapped = get_peft_model(transformer, config)
    oracle = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(wrapped).items()}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    assert [each.name for each in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    found = read(tmp_path)
    assert (found.plan.dialect, found.plan.kinds) == ("diffusers", ("rslora",))
    assert set(deltas(found)) == set(oracle)
    for path, change in deltas(found).items():
        torch.testing.assert_close(change, oracle[path], rtol=1e-5, atol=1e-8)

"""Every kind of adapter against peft's own arithmetic, or LyCORIS' published formulas: low-rank, or merged only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.adapters.formats.algebra import delta_of
from lora_server.adapters.formats.keys import Role
from lora_server.adapters.formats.reader import AdapterReader, ReadAdapter
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.engine.composition import phases
from lora_server.models.base import adapter_targets
from lora_server.models.block_scales import changed_paths
from lora_server.models.formulas import FormulaDelta
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.models.weights import LowRankDelta
from lora_server.use_settings import UseSettings
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.factories import TinyNet


def tiny() -> torch.nn.Module:
    """The same small model every time, in float64."""
    torch.manual_seed(0)
    return TinyNet().double()


def read(path: Path, dtype: torch.dtype = torch.float64, **options: Any) -> ReadAdapter:
    """Reads an adapter for the only component of a tiny model."""
    reader = AdapterReader(adapter_targets({"net": TinyNet()}), "net", "tiny", dtype, 64, **options)
    files = AdapterFolder(path, ["net"], AdapterRoots([path])).read(1 << 20)
    return reader.read_planned(path.name, files.contents)


def merged_deltas(found: ReadAdapter, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What merging writes, less what was there before, by path."""
    model = tiny()
    before = {path: model.get_submodule(path).weight.detach().clone() for path in linear_shapes(model)}
    WeightMerger("net", LinearStore(model)).apply([ScaledAdapter("sha256:a", scale, found.weights)])
    return {path: model.get_submodule(path).weight.detach() - weight for path, weight in before.items()}


PEFT_KINDS: dict[str, tuple[Any, bool, tuple[str, ...]]] = {
    "LoHa": (LoHaConfig(r=3, alpha=5), False, ("loha",)),
    "LoHa of too high a rank": (LoHaConfig(r=6, alpha=5), True, ("loha",)),
    "LoHa, Tucker for the convolution": (LoHaConfig(r=3, alpha=5, use_effective_conv2d=True), False, ("loha",)),
    "LoKr, Tucker for the convolution": (
        LoKrConfig(r=1, alpha=3, decompose_factor=2, use_effective_conv2d=True),
        False,
        ("lokr",),
    ),
    "LoKr, second matrix factored": (LoKrConfig(r=1, alpha=3, decompose_factor=2), False, ("lokr",)),
    "LoKr, both factored": (LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=3), False, ("lokr",)),
    "LoKr, whole matrices": (LoKrConfig(r=64, alpha=3, decompose_factor=2), False, ("lokr",)),
    "DoRA": (LoraConfig(r=3, lora_alpha=5, use_dora=True), True, ("dora",)),
    "DoRA with rsLoRA": (LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True), True, ("dora+rslora",)),
}


@pytest.mark.parametrize("case", PEFT_KINDS)
def test_pefts_kinds(tmp_path: Path, case: str) -> None:
    """What peft wrote changes the weights as peft's own merge does; slots take what has a low-rank form that fits.

    peft rounds some scalings to float32.
    """
    config, merged_only, kinds = PEFT_KINDS[case]
    config.target_modules = {"to_q", "to_k", "conv"}
    wrapped = get_peft_model(tiny(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(noise.abs() + 0.5 if "magnitude" in name else noise * 0.3)
    wrapped.save_pretrained(tmp_path)
    found = read(tmp_path, slot_rank=32)
    oracle, base = wrapped.merge_and_unload(), tiny()
    changes = merged_deltas(found)
    for path, change in changes.items():
        expected = oracle.get_submodule(path).weight - base.get_submodule(path).weight
        torch.testing.assert_close(change, expected.detach(), rtol=1e-6, atol=1e-8)
    assert any(change.abs().max() > 0.01 for change in changes.values())
    assert found.weights.merged_only("net") == merged_only
    assert found.plan.kinds == kinds


def test_a_formula_scales_by_its_whole_delta(tmp_path: Path) -> None:
    """A request's scale multiplies W'(scale 1) - W, also for DoRA: half of it at 0.5, nothing at 0."""
    test_pefts_kinds(tmp_path, "DoRA")
    found = read(tmp_path)
    whole = merged_deltas(found)
    for path, change in merged_deltas(found, 0.5).items():
        torch.testing.assert_close(change, 0.5 * whole[path], rtol=1e-9, atol=1e-12)
    assert not any(change.any() for change in merged_deltas(found, 0.0).values())


def test_formulas_and_low_rank_terms_add_up_and_leave_the_base_behind(tmp_path: Path) -> None:
    """DoRA beside LoRA on the same weights is the sum of both deltas; taking them off restores every bit."""
    test_pefts_kinds(tmp_path / "dora", "DoRA")
    test_pefts_kinds(tmp_path / "loha", "LoHa")
    dora, loha = read(tmp_path / "dora"), read(tmp_path / "loha")
    model = tiny()
    before = {path: model.get_submodule(path).weight.detach().clone() for path in linear_shapes(model)}
    merger = WeightMerger("net", LinearStore(model))
    both = [ScaledAdapter("sha256:a", 0.7, dora.weights), ScaledAdapter("sha256:b", -1.5, loha.weights)]
    for composition in (both, both[:1], both[1:], both):
        merger.apply(composition)
    first, second = merged_deltas(dora, 0.7), merged_deltas(loha, -1.5)
    for path, weight in before.items():
        change = model.get_submodule(path).weight - weight
        torch.testing.assert_close(change, first[path] + second[path], rtol=1e-9, atol=1e-12)
    merger.apply(())
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in before.items())


def test_formulas_heed_block_scales_and_schedules(tmp_path: Path) -> None:
    """DoRA's delta of a module gets the factor of its path, none at 0; while it is off, the others may use slots."""
    test_pefts_kinds(tmp_path / "dora", "DoRA")
    test_pefts_kinds(tmp_path / "loha", "LoHa")
    found, other = read(tmp_path / "dora"), read(tmp_path / "loha")
    whole = merged_deltas(found)
    settings = UseSettings((("net", 2.0),), (("blocks.0", 0.5), ("conv", 0.0)))
    model = tiny()
    before = {path: model.get_submodule(path).weight.detach().clone() for path in linear_shapes(model)}
    WeightMerger("net", LinearStore(model)).apply([ScaledAdapter("sha256:a", 0.7, found.weights, settings)])
    for path, weight in before.items():
        factor = 0.0 if path == "conv" else 0.7 if path.startswith("blocks.0.") else 1.4
        change = model.get_submodule(path).weight - weight
        torch.testing.assert_close(change, factor * whole[path], rtol=1e-9, atol=1e-12)
    assert torch.equal(model.conv.weight, before["conv"])
    late = ScaledAdapter("sha256:a", 1.0, found.weights, UseSettings(start=0.5))
    always = ScaledAdapter("sha256:b", 1.0, other.weights)
    assert [phase.takes_slots for phase in phases([late, always], "net", 4)] == [True, True, False, False]
    assert set(changed_paths(found.weights, "net", adapter_targets({"net": TinyNet()}))) == {
        path for path, change in whole.items() if change.any()
    }


def test_formulas_survive_the_move_to_a_device(tmp_path: Path) -> None:
    """A copy of the weights has the formulas too, over buffers of its own."""
    test_pefts_kinds(tmp_path, "DoRA")
    found = read(tmp_path)
    copied = ReadAdapter(found.weights.to(torch.device("cpu")), found.layout)
    for path, change in merged_deltas(copied).items():
        torch.testing.assert_close(change, merged_deltas(found)[path], rtol=0, atol=0)


def tensors_of(shapes: dict[Role, tuple[int, ...]]) -> dict[Role, torch.Tensor]:
    """Random tensors by role."""
    generator = torch.Generator().manual_seed(2)
    return {role: torch.randn(shape, generator=generator, dtype=torch.float64) for role, shape in shapes.items()}


def full(delta: LowRankDelta | FormulaDelta, base: torch.Tensor) -> torch.Tensor:
    """A delta written out."""
    return delta.scaling * delta.b @ delta.a if isinstance(delta, LowRankDelta) else delta.delta(base)


OUT, IN, RANK, KERNEL = 6, 4, 2, (3, 3)
LYCORIS: dict[str, tuple[str, dict[Role, tuple[int, ...]]]] = {
    "LoRA, convolution": ("lora", {Role.UP: (OUT, RANK, 1, 1), Role.DOWN: (RANK, IN, *KERNEL)}),
    "LoRA, Tucker": (
        "lora",
        {Role.UP: (OUT, RANK, 1, 1), Role.DOWN: (RANK, IN, 1, 1), Role.MID: (RANK, RANK, *KERNEL)},
    ),
    "LoHa, convolution": (
        "loha",
        {
            Role.HADA_W1_A: (OUT, RANK), Role.HADA_W1_B: (RANK, IN * 9),
            Role.HADA_W2_A: (OUT, RANK), Role.HADA_W2_B: (RANK, IN * 9),
        },
    ),
    "LoHa, Tucker": (
        "loha",
        {
            Role.HADA_T1: (RANK, RANK, *KERNEL), Role.HADA_W1_A: (RANK, OUT), Role.HADA_W1_B: (RANK, IN),
            Role.HADA_T2: (RANK, RANK, *KERNEL), Role.HADA_W2_A: (RANK, OUT), Role.HADA_W2_B: (RANK, IN),
        },
    ),
    "LoKr, convolution": (
        "lokr",
        {Role.LOKR_W1: (2, 2), Role.LOKR_W2_A: (3, RANK), Role.LOKR_W2_B: (RANK, 2 * 9)},
    ),
    "LoKr, Tucker": (
        "lokr",
        {
            Role.LOKR_W1: (2, 2), Role.LOKR_T2: (RANK, RANK, *KERNEL),
            Role.LOKR_W2_A: (RANK, 3), Role.LOKR_W2_B: (RANK, 2),
        },
    ),
    "LoKr, whole": ("lokr", {Role.LOKR_W1: (2, 2), Role.LOKR_W2: (3, 2, *KERNEL)}),
}  # fmt: skip


def by_lycoris(kind: str, t: dict[Role, torch.Tensor]) -> torch.Tensor:
    """The delta of a convolution as LyCORIS' functional forms define it, (out, in, kh, kw)."""

    def tucker(core: Role, a: Role, b: Role) -> torch.Tensor:
        return torch.einsum("ijkl,jr,ip->prkl", t[core], t[b], t[a])

    if kind == "lora":
        if Role.MID in t:
            return torch.einsum("oi,ijkl,jr->orkl", t[Role.UP].flatten(1), t[Role.MID], t[Role.DOWN].flatten(1))
        return torch.einsum("oi,irkl->orkl", t[Role.UP].flatten(1), t[Role.DOWN])
    if kind == "loha":
        if Role.HADA_T1 in t:
            return tucker(Role.HADA_T1, Role.HADA_W1_A, Role.HADA_W1_B) * tucker(
                Role.HADA_T2, Role.HADA_W2_A, Role.HADA_W2_B
            )
        product = (t[Role.HADA_W1_A] @ t[Role.HADA_W1_B]) * (t[Role.HADA_W2_A] @ t[Role.HADA_W2_B])
        return product.view(OUT, IN, *KERNEL)
    if Role.LOKR_T2 in t:
        second = tucker(Role.LOKR_T2, Role.LOKR_W2_A, Role.LOKR_W2_B)
    elif Role.LOKR_W2 in t:
        second = t[Role.LOKR_W2]
    else:
        second = (t[Role.LOKR_W2_A] @ t[Role.LOKR_W2_B]).view(3, 2, *KERNEL)
    return torch.kron(t[Role.LOKR_W1][:, :, None, None], second.contiguous())


@pytest.mark.parametrize("slot_rank", [64, 1])
@pytest.mark.parametrize("case", LYCORIS)
def test_convolutions_of_lycoris(case: str, slot_rank: int) -> None:
    """A kernel counts as input: each form, low-rank and as a formula, is LyCORIS' tensor flattened."""
    kind, shapes = LYCORIS[case]
    tensors = tensors_of(shapes)
    delta = delta_of(kind, tensors, 0.5, RANK, exact=torch.float64, magnitude_by_output=False)
    base = torch.zeros(OUT, IN * 9, dtype=torch.float64)
    expected = 0.5 * by_lycoris(kind, tensors).flatten(1)
    torch.testing.assert_close(full(delta.part(None, slot_rank), base), expected)
    rows = ((4, 6), (0, 1))
    picked = full(delta.part(rows, slot_rank), base[:3])
    torch.testing.assert_close(picked, torch.cat([expected[4:6], expected[0:1]]))


@pytest.mark.parametrize("shape", [(OUT, 1), (OUT, 1, 1, 1), (1, IN), (1, IN, 1, 1)])
def test_magnitudes_along_either_axis(shape: tuple[int, ...]) -> None:
    """LyCORIS keeps one magnitude an output, or one an input channel over outputs and kernel."""
    tensors = tensors_of({Role.UP: (OUT, RANK, 1, 1), Role.DOWN: (RANK, IN, *KERNEL), Role.MAGNITUDE: shape})
    base = torch.randn(OUT, IN, *KERNEL, dtype=torch.float64)
    changed = base + by_lycoris("lora", tensors)
    dims = (1, 2, 3) if shape[0] == OUT else (0, 2, 3)
    magnitude = (
        tensors[Role.MAGNITUDE].view(-1, 1, 1, 1) if shape[0] == OUT else tensors[Role.MAGNITUDE].view(1, -1, 1, 1)
    )
    expected = changed * magnitude / changed.pow(2).sum(dim=dims, keepdim=True).sqrt() - base
    delta = delta_of("lora", tensors, 1.0, RANK, exact=torch.float64, magnitude_by_output=False).part(None, 64)
    torch.testing.assert_close(full(delta, base.flatten(1)), expected.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_weights_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """fp8 factors mean the numbers that they are."""
    up, down = torch.randn(6, 2).to(dtype), torch.randn(2, 6).to(dtype)
    name = "lora_unet_blocks_0_to_q"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "x.safetensors")
    change = merged_deltas(read(tmp_path / "x.safetensors"))["blocks.0.to_q"]
    torch.testing.assert_close(change, up.double() @ down.double(), rtol=0, atol=1e-12)


def test_dora_of_kohya_through_its_whole_file(tmp_path: Path) -> None:
    """`dora_scale` beside lora_up and lora_down is DoRA, whose norm is of the whole changed weight."""
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(6, 2, generator=generator), torch.randn(2, 6, generator=generator)
    magnitude = torch.rand(6, 1, generator=generator) + 0.5
    name = "lora_unet_blocks_0_to_q"
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude, "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{key}": value for key, value in tensors.items()}, tmp_path / "x.safetensors")
    base = tiny().get_submodule("blocks.0.to_q").weight.detach()
    changed = base + 0.5 * up.double() @ down.double()
    expected = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - base
    found = read(tmp_path / "x.safetensors")
    torch.testing.assert_close(merged_deltas(found)["blocks.0.to_q"], expected, rtol=1e-9, atol=1e-12)
    assert found.plan.kinds == ("dora",)

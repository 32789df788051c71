"""Merged application: in place, from pristine copies."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lora_server.models import merge
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack

from tests.factories import TinyNet


def deltas(net: TinyNet, count: int) -> list[dict[str, LowRankDelta]]:
    """Random deltas for some linears of the net, of different ranks."""
    made = []
    for index in range(count):
        torch.manual_seed(index)
        paths = ["conv", "blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"][: 2 + index % 3]
        found = {}
        for path in paths:
            rank, like = 1 + index % 4, net.get_submodule(path).weight
            out_features, in_features = like.flatten(1).shape
            a, b = torch.randn(rank, in_features).to(like), torch.randn(out_features, rank).to(like)
            found[path] = LowRankDelta(a, b, 0.5 + index)
        made.append(found)
    return made


def adapters(net: TinyNet, count: int) -> list[AdapterWeights]:
    """The same, packed."""
    targets = {"net": linear_shapes(net)}
    return [pack({"net": each}, targets) for each in deltas(net, count)]


def weights_of(net: TinyNet) -> dict[str, torch.Tensor]:
    """The linears' weights, copied."""
    return {path: net.get_submodule(path).weight.detach().clone() for path in linear_shapes(net)}


def test_base_returns_bit_for_bit_after_1000_switches() -> None:
    """Any number of switches leaves no trace: copying back cannot drift."""
    net = TinyNet()
    pristine = weights_of(net)
    merger, made, rng = WeightMerger("net", LinearStore(net, 8)), adapters(net, 5), random.Random(0)
    for _ in range(1000):
        chosen = rng.sample(range(5), rng.randint(0, 3))
        merger.apply([ScaledAdapter(f"sha256:{k}", rng.uniform(-2, 2), made[k]) for k in chosen])
    merger.apply([])
    assert all(torch.equal(value, pristine[path]) for path, value in weights_of(net).items())


def test_weights_are_base_plus_scaled_deltas() -> None:
    """W = W_base + sum of scale * scaling * B A, whatever was merged before, in any order."""
    net = TinyNet().double()
    base = weights_of(net)
    merger = WeightMerger("net", LinearStore(net))
    made, plain = adapters(net, 3), deltas(net, 3)
    merger.apply([ScaledAdapter("sha256:9", 3.0, made[2])])
    merger.apply([ScaledAdapter("sha256:1", -0.5, made[1]), ScaledAdapter("sha256:0", 2.0, made[0])])
    for path, weight in weights_of(net).items():
        expected = base[path].clone()
        for scale, each in ((-0.5, plain[1]), (2.0, plain[0])):
            if path in each:
                expected += (scale * each[path].scaling * each[path].b @ each[path].a).view(expected.shape)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_without_a_kernel_the_products_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs a C compiler when it first runs; an image without one serves all the same. Tried once."""
    tries: list[object] = []
    monkeypatch.setattr(merge, "_has_kernel", lambda base: tries.append(base) or True)  # and it cannot run here
    net, other = TinyNet(), TinyNet()
    other.load_state_dict(net.state_dict())
    merger, made = WeightMerger("net", LinearStore(net, 8)), adapters(net, 2)
    groups = len({delta.group for each in made for delta in each.groups["net"]})
    for k in (0, 1, 0):
        merger.apply([ScaledAdapter(f"sha256:{k}", 0.5, made[k])])
    assert len(tries) == 1 < groups * 3
    monkeypatch.setattr(merge, "_has_kernel", lambda base: False)
    WeightMerger("net", LinearStore(other, 8)).apply([ScaledAdapter("sha256:0", 0.5, made[0])])
    expected = weights_of(other)
    assert all(torch.equal(weight, expected[path]) for path, weight in weights_of(net).items())


def test_scattered_members_of_a_group() -> None:
    """An adapter that leaves out linears in the middle of a group changes only its own."""
    net = torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(5)]).double()
    base = {path: net.get_submodule(path).weight.detach().clone() for path in linear_shapes(net)}
    delta = {path: LowRankDelta(torch.ones(1, 5).double(), torch.ones(5, 1).double(), 2.0) for path in ("0", "3")}
    merger = WeightMerger("net", LinearStore(net, 4))
    merger.apply([ScaledAdapter("sha256:0", 0.5, pack({"net": delta}, {"net": linear_shapes(net)}))])
    for path, before in base.items():
        change = net.get_submodule(path).weight - before
        torch.testing.assert_close(change, torch.full_like(change, 1.0 if path in delta else 0.0))


def test_scale_zero_writes_nothing() -> None:
    """An adapter at scale 0 is the base, and costs no write."""
    net = TinyNet()
    merger = WeightMerger("net", LinearStore(net))
    assert not merger.apply([ScaledAdapter("sha256:0", 0.0, adapters(net, 1)[0])])


def test_an_interrupted_write_is_repaired_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write fails half-way, the next composition is exact all the same."""
    net = TinyNet()
    pristine = weights_of(net)
    merger = WeightMerger("net", LinearStore(net))
    real, calls = torch.baddbmm, iter(range(100))

    def fails_second(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return real(*args, **options)

    composition = [ScaledAdapter("sha256:0", 1.0, adapters(net, 3)[2])]
    monkeypatch.setattr(torch, "baddbmm", fails_second)
    with pytest.raises(torch.OutOfMemoryError):
        merger.apply(composition)
    monkeypatch.undo()
    assert any(not torch.equal(value, pristine[path]) for path, value in weights_of(net).items())
    merger.apply([])
    assert all(torch.equal(value, pristine[path]) for path, value in weights_of(net).items())


def test_linears_that_stay_in_float32_take_adapters_of_a_half_type() -> None:
    """T5 keeps its output linears so in float16 models: the sum is made and kept in float32."""
    net = TinyNet().half()
    kept = net.blocks[0]["to_k"].float()  # type: ignore[index]
    base = weights_of(net)
    delta = LowRankDelta(torch.randn(2, 6).half(), torch.randn(8, 2).half(), 1.0)
    weights = pack({"net": {"blocks.0.to_k": delta}}, {"net": linear_shapes(net)})
    merger = WeightMerger("net", LinearStore(net, 0))
    merger.apply([ScaledAdapter("sha256:0", 0.5, weights)])
    expected = base["blocks.0.to_k"] + 0.5 * (delta.b.float() @ delta.a.float())
    torch.testing.assert_close(kept.weight, expected, rtol=1e-6, atol=1e-6)
    merger.apply([])
    assert torch.equal(kept.weight, base["blocks.0.to_k"])

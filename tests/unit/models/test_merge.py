"""Merged application: in place, from pristine copies."""

from __future__ import annotations

import random

import torch
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.models.weights import AdapterWeights, LowRankDelta

from tests.factories import TinyNet


def adapters(net: TinyNet, count: int) -> list[AdapterWeights]:
    """Random adapters for some linears of the net, of different ranks."""
    made = []
    for index in range(count):
        torch.manual_seed(index)
        paths = ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"][: 1 + index % 3]
        deltas = {}
        for path in paths:
            linear = net.get_submodule(path)
            rank = 1 + index % 4
            deltas[path] = LowRankDelta(
                torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank), 0.5 + index
            )
        made.append(AdapterWeights({"net": deltas}))
    return made


def test_base_returns_bit_for_bit_after_1000_switches() -> None:
    """Any number of switches leaves no trace: copying back cannot drift."""
    net = TinyNet()
    pristine = {name: value.clone() for name, value in net.state_dict().items()}
    merger, made, rng = WeightMerger("net", net), adapters(net, 5), random.Random(0)
    for _ in range(1000):
        chosen = rng.sample(range(5), rng.randint(0, 3))
        merger.apply([ScaledAdapter(f"sha256:{k}", rng.uniform(-2, 2), made[k]) for k in chosen])
    merger.apply([])
    assert all(torch.equal(value, pristine[name]) for name, value in net.state_dict().items())


def test_weights_are_base_plus_scaled_deltas() -> None:
    """W = W_base + sum of scale * scaling * B A, whatever was merged before, in any order."""
    net = TinyNet().double()
    base = net.get_submodule("blocks.0.to_q").weight.detach().clone()
    made = adapters(net, 3)
    merger = WeightMerger("net", net)
    merger.apply([ScaledAdapter("sha256:9", 3.0, made[2])])
    merger.apply([ScaledAdapter("sha256:1", -0.5, made[1]), ScaledAdapter("sha256:0", 2.0, made[0])])
    expected = base.clone()
    for scale, weights in ((-0.5, made[1]), (2.0, made[0])):
        delta = weights.deltas["net"]["blocks.0.to_q"]
        expected += scale * delta.scaling * delta.b.double() @ delta.a.double()
    torch.testing.assert_close(net.get_submodule("blocks.0.to_q").weight, expected, rtol=1e-12, atol=1e-12)


def test_scale_zero_writes_nothing() -> None:
    """An adapter at scale 0 is the base, and costs no write."""
    net = TinyNet()
    merger = WeightMerger("net", net)
    assert not merger.apply([ScaledAdapter("sha256:0", 0.0, adapters(net, 1)[0])])


def test_an_interrupted_write_is_repaired_by_the_next() -> None:
    """If a write fails half-way, the next composition is exact all the same."""
    net = TinyNet()
    pristine = {name: value.clone() for name, value in net.state_dict().items()}
    merger = WeightMerger("net", net)
    broken = AdapterWeights(
        {
            "net": {
                "blocks.0.to_q": LowRankDelta(torch.ones(1, 6), torch.ones(6, 1), 1.0),
                "blocks.0.to_k": LowRankDelta(torch.ones(1, 5), torch.ones(8, 1), 1.0),  # does not fit
            }
        }
    )
    try:
        merger.apply([ScaledAdapter("sha256:0", 1.0, broken)])
    except RuntimeError:
        pass
    else:
        raise AssertionError("the write should have failed")
    merger.apply([])
    assert all(torch.equal(value, pristine[name]) for name, value in net.state_dict().items())

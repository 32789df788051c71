"""Block scales in merged weights: each linear gets the factor of its own path."""

from __future__ import annotations

import torch
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.merge import ScaledAdapter, WeightMerger, composition_key
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack
from lora_server.use_settings import UseSettings

from tests.factories import TinyNet


def made(net: TinyNet, seed: int = 0) -> tuple[AdapterWeights, dict[str, torch.Tensor]]:
    """A random adapter for every linear and the convolution of the net, and its change of each weight at scale 1."""
    torch.manual_seed(seed)
    deltas = {
        path: LowRankDelta(
            torch.randn(2, shape.in_features).to(net.conv.weight.dtype),
            torch.randn(shape.out_features, 2).to(net.conv.weight.dtype),
            0.5,
        )
        for path, shape in linear_shapes(net).items()
    }
    weights = pack({"net": deltas}, {"net": linear_shapes(net)})
    changes = {path: 0.5 * delta.b @ delta.a for path, delta in deltas.items()}
    return weights, {path: change.view_as(net.get_submodule(path).weight) for path, change in changes.items()}


def copies(net: TinyNet) -> dict[str, torch.Tensor]:
    """Their weights, copied."""
    return {path: net.get_submodule(path).weight.detach().clone() for path in linear_shapes(net)}


def blocks(*scales: tuple[str, float], component: float = 1.0) -> UseSettings:
    """Settings with these block scales and a factor for the whole net."""
    return UseSettings((("net", component),), scales)


def test_every_linear_has_its_own_factor() -> None:
    """Scale, component factor and block factor multiply; two adapters on one linear keep theirs apart."""
    net = TinyNet().double()
    base = copies(net)
    (first, change), (second, other) = made(net, 1), made(net, 2)
    WeightMerger("net", LinearStore(net)).apply(
        [
            ScaledAdapter("a", 0.5, first, blocks(("blocks.0", 3.0), ("*.*.to_k", -1.0), ("conv", 0.5), component=2.0)),
            ScaledAdapter("b", 1.0, second, blocks(("blocks.0", 0.0))),
        ]
    )
    # `*.*.to_k` has more parts than `blocks.0`.
    factors = {"blocks.0.to_q": (3.0, 0.0), "blocks.0.to_k": (-1.0, 0.0), "blocks.1.to_q": (1.0, 1.0)}
    factors["conv"] = (0.5, 1.0)
    for path, weight in copies(net).items():
        expected = base[path] + factors[path][0] * change[path] + factors[path][1] * other[path]
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_a_factor_of_0_leaves_the_base_bit_for_bit() -> None:
    """Also where other linears of the same shape change, and after a composition that changed this one."""
    net = TinyNet()
    base = copies(net)
    merger, (weights, _) = WeightMerger("net", LinearStore(net)), made(net)
    merger.apply([ScaledAdapter("a", 1.0, weights)])
    merger.apply([ScaledAdapter("a", 1.0, weights, blocks(("blocks.1", 0.0)))])
    after = copies(net)
    assert torch.equal(after["blocks.1.to_q"], base["blocks.1.to_q"])
    assert not torch.equal(after["blocks.0.to_q"], base["blocks.0.to_q"])
    merger.apply([ScaledAdapter("a", 1.0, weights, blocks(("*", 0.0)))])
    assert all(torch.equal(weight, base[path]) for path, weight in copies(net).items())


def test_factors_are_not_rounded_to_half_types() -> None:
    """In bfloat16 0.3 would be 0.4% off; what is written is as near as the weights' own type allows."""
    net = TinyNet().bfloat16()
    base, (weights, _) = copies(net), made(net)
    WeightMerger("net", LinearStore(net)).apply([ScaledAdapter("a", 1.0, weights, blocks(("*", 0.3)))])
    scaled = copies(net)
    other = TinyNet().bfloat16()
    other.load_state_dict({**other.state_dict(), **{f"{path}.weight": weight for path, weight in base.items()}})
    WeightMerger("net", LinearStore(other)).apply([ScaledAdapter("a", 0.3, weights)])
    for path, weight in copies(other).items():
        torch.testing.assert_close(scaled[path], weight, rtol=2**-7, atol=0.01)


def test_the_key_names_all_that_changes_the_weights() -> None:
    """Other factors are another composition; a component at 0 is the base; a schedule is not in the weights."""
    weights, _ = made(TinyNet())

    def key(settings: UseSettings) -> object:
        return composition_key([ScaledAdapter("a", 1.0, weights, settings)], "net")

    plain = key(UseSettings())
    assert len({plain, key(blocks(("blocks.0", 0.5))), key(blocks(component=0.5)), key(blocks(("blocks.0", 0.2)))}) == 4
    assert key(blocks(component=0.0)) == ()
    assert key(UseSettings(start=0.5)) == plain

"""What an image uses of the denoiser at each of its steps."""

from __future__ import annotations

from lora_server.engine.composition import for_text, phases
from lora_server.models.linear_store import linear_shapes
from lora_server.models.merge import ScaledAdapter, composition_key
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack
from lora_server.use_settings import UseSettings
from torch import randn

from tests.factories import TinyNet


def weights(rank: int = 2) -> AdapterWeights:
    """An adapter of one linear of the net, and of one of the text encoder."""
    net = TinyNet()
    delta = {"blocks.0.to_q": LowRankDelta(randn(rank, 6), randn(6, rank), 1.0)}
    return pack({"net": delta, "text": delta}, {"net": linear_shapes(net), "text": linear_shapes(net)})


def scaled(digest: str, settings: UseSettings, rank: int = 2) -> ScaledAdapter:
    """One member."""
    return ScaledAdapter(digest, 1.0, weights(rank), settings)


def test_an_adapter_is_in_the_composition_only_while_it_acts() -> None:
    """Outside its schedule neither the key nor the ranks know of it."""
    found = phases([scaled("a", UseSettings(end=0.5)), scaled("b", UseSettings(start=0.25), 3)], "net", 4)
    assert [sorted(phase.ranks) for phase in found] == [["a"], ["a", "b"], ["b"], ["b"]]
    assert [tuple(digest for digest, *_ in phase.key) for phase in found] == [("a",), ("a", "b"), ("b",), ("b",)]
    assert found[2] is found[3]


def test_outside_every_schedule_it_is_the_base() -> None:
    """Such a step can share a batch with images that have no adapters."""
    first, second = phases([scaled("a", UseSettings(start=0.5))], "net", 2)
    assert not first.key
    assert first.takes_slots
    assert second.key


def test_block_scales_take_no_slots_while_they_act() -> None:
    """When the adapter that has them is off, or off the denoiser, its row takes slots again."""
    blocks = (("blocks.0", 0.5),)
    first, second = phases([scaled("a", UseSettings((), blocks, end=0.5)), scaled("b", UseSettings())], "net", 2)
    assert (first.takes_slots, second.takes_slots) == (False, True)
    (off,) = phases([scaled("a", UseSettings((("net", 0.0),), blocks))], "net", 1)
    assert (off.takes_slots, off.key) == (True, ())


def test_text_encoders_see_the_component_scale_alone() -> None:
    """Neither block scales nor the schedule change what a prompt is encoded with, nor what it is cached under."""
    settings = UseSettings((("text", 0.5),), (("blocks.0", 0.0),), start=0.9)
    (seen,) = for_text([scaled("a", settings)])
    assert seen.scale_in("text") == 0.5
    assert composition_key([seen], "text") == (("a", 0.5, ()),)

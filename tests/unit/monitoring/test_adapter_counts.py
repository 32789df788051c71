"""Counts of adapters whose labels are bounded."""

from __future__ import annotations

from lora_server.monitoring.uses import OTHER, AdapterUses


def test_no_use_is_lost_or_counted_twice() -> None:
    """The labels and `other` add up to all uses, while nobody loses a label."""
    uses = AdapterUses(max_labels=2)
    uses.note(["a", "a", "b", "c", "a"])
    assert uses.labelled() == {"a": 3, "b": 1, OTHER: 1}


def test_a_newcomer_takes_the_place_of_the_least_used() -> None:
    """Once it has been used more; its label begins with that use."""
    uses = AdapterUses(max_labels=1)
    uses.note(["a", "b", "b"])
    assert uses.labelled() == {"b": 1, OTHER: 1}
    assert list(uses.top()) == [("b", 2, False), ("a", 1, False)]


def test_labels_are_bounded_however_many_adapters_there_are() -> None:
    """Twenty thousand names leave so many labels, and so many counts."""
    uses = AdapterUses(max_labels=20)
    uses.note(f"adapter-{k}" for k in range(20_000))
    uses.note(["star"] * 3)
    assert len(uses.labelled()) == 21
    assert len(uses._counts) <= 4097
    assert next(uses.top()) == ("star", 3, False)


def test_an_adapter_named_other_is_among_the_rest() -> None:
    """It cannot make two series of one name."""
    uses = AdapterUses(max_labels=5)
    uses.note([OTHER, "a"])
    assert uses.labelled() == {"a": 1, OTHER: 1}

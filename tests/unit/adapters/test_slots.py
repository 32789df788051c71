"""The device's slots against their invariants."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_server.adapters.slots import SlotTable
from lora_server.errors import CacheExhaustedError

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["use", "pin", "unpin", "forget"]), st.integers(0, 7), st.integers(0, 7)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_random_operations_keep_the_books(operations: list[tuple[str, int, int]]) -> None:
    """After every operation each slot has one version, and what is pinned has room."""
    table, pinned = SlotTable(4, min_free=2), set()
    for kind, first, second in operations:
        try:
            if kind == "use":
                digests = [str(first), str(second)]
                taken = table.acquire(digests)
                assert len({slot for slot, _, _ in taken}) == len(set(digests))
                table.release(digests)
            elif kind == "pin":
                table.pin(str(first), "owner")
                pinned.add(str(first))
            elif kind == "unpin":
                table.unpin(str(first), "owner")
                pinned.discard(str(first))
            elif table.forget(str(first)):
                assert not table.is_resident(str(first))
        except CacheExhaustedError:
            assert kind == "pin"
        table.check_integrity()
        assert len(pinned) <= 2


def test_a_taken_slot_is_never_given_away() -> None:
    """All or none: a request that does not fit beside those in use changes nothing."""
    table = SlotTable(2)
    table.acquire(["a"])
    with pytest.raises(CacheExhaustedError):
        table.acquire(["b", "c"])
    assert not table.is_resident("b")
    assert table.acquire(["b"])[0][2]

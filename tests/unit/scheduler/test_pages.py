"""Which adapter lies in which pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from lora_server.scheduler.pages import PageTable


def test_adapters_stay_where_they_are() -> None:
    """A batch that needs the same adapters again writes nothing."""
    table = PageTable(16, 4)
    first = table.place({"a": 16, "b": 20})
    again = table.place({"b": 20, "a": 16})
    assert first is not None
    assert again is not None
    assert set(first.new) == {"a", "b"}
    assert again.new == ()
    assert again.pages == first.pages
    assert len(first.pages["b"]) == 2


def test_least_recently_used_makes_room() -> None:
    """The adapter that was used longest ago is overwritten."""
    table = PageTable(16, 2)
    table.place({"a": 1})
    table.place({"b": 1})
    table.place({"a": 1})
    placed = table.place({"c": 1})
    assert placed is not None
    assert table.place({"a": 1}).new == ()  # type: ignore[union-attr]
    assert table.place({"b": 1}).new == ("b",)  # type: ignore[union-attr]


def test_what_cannot_fit_changes_nothing() -> None:
    """More pages than there are: no placement, and the others stay."""
    table = PageTable(16, 2)
    table.place({"a": 16})
    assert table.place({"b": 16, "c": 32}) is None
    assert table.place({"a": 16}).new == ()  # type: ignore[union-attr]


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), max_size=4), st.integers(1, 6)),
        max_size=30,
    )
)
def test_books_are_right_after_any_placements(batches: list[tuple[dict[str, int], int]]) -> None:
    """Every adapter gets distinct pages below the limit, or the batch is refused because it cannot fit."""
    table, rank_of = PageTable(16, 6), {}
    for ranks, limit in batches:
        wanted = {name: rank_of.setdefault(name, rank) for name, rank in ranks.items()}
        placed = table.place(wanted, limit)
        table.check_integrity()
        fits = sum(map(table.pages_for, wanted.values())) <= limit
        assert (placed is not None) == fits
        if placed is not None:
            pages = [page for digest in wanted for page in placed.pages[digest]]
            assert len(pages) == len(set(pages)) == sum(map(table.pages_for, wanted.values()))
            assert all(page < limit for page in pages)

"""Names, ids and digests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_server.adapters.naming import MAX_ID, is_valid_name, name_for, stable_adapter_id


def test_stable_id_equals_the_seed_systems() -> None:
    """The id of a path, to the digit; a trailing slash makes another."""
    assert stable_adapter_id("/adapters/a") == 7740576302019439696
    assert stable_adapter_id("/adapters/a/") != 7740576302019439696


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_every_path_has_an_id_and_a_name(path: str) -> None:
    """Whatever the path, the id is in range, the name is valid, and a taken one is avoided."""
    adapter_id = stable_adapter_id(path)
    assert 1 <= adapter_id <= MAX_ID
    first = name_for(path, adapter_id, set())
    second = name_for(path, adapter_id, {first})
    assert is_valid_name(first)
    assert is_valid_name(second)
    assert first != second


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "é", "a" * 129, "a/b"])
def test_bad_names_are_refused(name: str) -> None:
    """Names keep to their alphabet and length."""
    assert not is_valid_name(name)

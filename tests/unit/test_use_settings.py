"""Where and when an adapter acts: factors by block, and steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_server.use_settings import UseSettings, block_factor, covers


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("blocks.3", "blocks.3.attn.to_q", True),
        ("blocks.3", "blocks.31.attn.to_q", False),
        ("blocks.3.attn.to_q", "blocks.3.attn.to_q", True),
        ("blocks.3.attn.to_q.x", "blocks.3.attn.to_q", False),
        ("blocks.*.attn", "blocks.12.attn.to_out.0", True),
        ("blocks.*", "blocks.1.ff.net", True),
        ("blocks.1?", "blocks.1.ff", False),
        ("*.attn", "blocks.1.attn", False),
        ("attn", "blocks.1.attn", False),
    ],
)
def test_a_pattern_is_the_beginning_of_a_path_in_whole_parts(pattern: str, path: str, expected: bool) -> None:
    """A star never crosses a dot, and block 3 is not block 31."""
    assert covers(pattern, path) is expected


def test_the_most_particular_pattern_counts() -> None:
    """More parts win over fewer, wherever they stand; among equals the last; without a match it is 1."""
    scales = (("blocks.1.attn", 0.2), ("blocks", 0.5), ("blocks.*", 0.6), ("blocks.2", 0.7))
    assert [block_factor(scales, f"{path}.w") for path in ("blocks.1.attn", "blocks.1.ff", "blocks.2", "out")] == [
        0.2, 0.6, 0.7, 1.0,
    ]  # fmt: skip


def test_component_factors_are_1_unless_given() -> None:
    """Only what is named changes."""
    settings = UseSettings(component_scales=(("text_encoder", 0.0),))
    assert (settings.component_factor("text_encoder"), settings.component_factor("transformer")) == (0.0, 1.0)


@given(steps=st.integers(1, 500), data=st.data())
def test_a_schedule_holds_the_steps_from_start_and_before_end(steps: int, data: st.DataObject) -> None:
    """Fractions that are k / N mean step k exactly, also as float32, in which they come over the wire."""
    first = data.draw(st.integers(0, steps - 1))
    end = data.draw(st.integers(first + 1, steps))
    for exact in (float, np.float32):
        settings = UseSettings(start=float(exact(first / steps)), end=float(exact(end / steps)))
        acting = [step for step in range(steps) if settings.acts_at(step, steps)]
        assert acting == list(range(first, end))


@given(cut=st.floats(0.0, 1.0), steps=st.integers(1, 100))
def test_two_schedules_that_meet_share_no_step_and_miss_none(cut: float, steps: int) -> None:
    """A hand-over at any fraction gives each step to exactly one of the two."""
    before, after = UseSettings(end=cut), UseSettings(start=cut)
    assert all(before.acts_at(step, steps) != after.acts_at(step, steps) for step in range(steps))

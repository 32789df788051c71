"""Patterns of strangers: matched as Python's re would, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_server.adapters.formats.patterns import Matcher, PatternError, names_end_of

PATHS = st.text("ab.01_", min_size=1, max_size=12)


@given(
    st.lists(st.sampled_from(["a", "b", ".", r"\.", "(", ")", "|", "*", "+", r"\d", "[01]", ".*", "?", "^", "$"])),
    PATHS,
)
def test_matches_are_those_of_re(parts: list[str], path: str) -> None:
    """What re matches is matched, what re refuses is refused."""
    pattern = "".join(parts)
    try:
        expected = re.fullmatch(pattern, path) is not None
    except re.error:
        with pytest.raises(PatternError):
            Matcher().fullmatch(pattern, path)
    else:
        assert Matcher().fullmatch(pattern, path) is expected


@pytest.mark.parametrize("pattern", ["(?R)", "(a|(?1))*", "(?:foo){e<=5}x(?&y)", "a" * 2001, "[ab]" * 33])
def test_what_re_does_not_know_or_is_too_long_is_refused(pattern: str) -> None:
    """Recursion of the regex library ate half a gigabyte; classes ignoring case took seconds to compile."""
    with pytest.raises(PatternError):
        Matcher().fullmatch(pattern, "blocks.0.to_q")


def test_all_patterns_of_a_file_share_their_time() -> None:
    """A pattern that is slow for every module does not cost its time for each of them."""
    matcher, began_s = Matcher(), time.thread_time()
    refused = 0
    for k in range(200):
        try:
            matcher.fullmatch("(a|aa)+(a|aa)+(a|aa)+!", "a" * 60 + str(k))
        except PatternError:
            refused += 1
    assert refused > 150
    assert time.thread_time() - began_s < 2


@given(st.sets(PATHS, max_size=5), PATHS)
def test_names_are_ends_at_a_dot(names: set[str], path: str) -> None:
    """As peft: the whole path, or an end that follows a dot."""
    assert names_end_of(names, path) == any(path == name or path.endswith(f".{name}") for name in names)

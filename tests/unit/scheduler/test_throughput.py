"""How long work takes, what comes before a request, and when the refused should come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_server.scheduler.backlog import Backlog
from lora_server.scheduler.returns import Returns
from lora_server.scheduler.throughput import Throughput


def test_before_the_first_step_nothing_is_known() -> None:
    """None, not zero and not an error."""
    assert Throughput().seconds(10) is None


def test_the_rate_is_of_work_and_not_of_batches() -> None:
    """A batch of a hundred and one of one count by what they did."""
    throughput = Throughput()
    throughput.observe(100, 1.0)
    throughput.observe(1, 0.01)
    assert throughput.seconds(5050) == pytest.approx(50.5, rel=0.02)


def test_the_latest_seconds_count_most() -> None:
    """A server that has become twice as slow says so after some dozens of seconds."""
    throughput = Throughput()
    throughput.observe(1, 1.0)
    for _ in range(40):
        throughput.observe(1, 2.0)
    assert throughput.seconds(1) == pytest.approx(2.0, rel=0.02)


def test_fair_turns_until_a_request_is_done() -> None:
    """A small request waits for as much of each other one, not for their ends."""
    backlog = Backlog()
    backlog.put("a", 1, 1000)
    assert backlog.until_done("a", 10) == 20  # its own, and as much of the other
    assert backlog.until_done("b", 10) == 20
    backlog.put("a", 2, 5)
    assert backlog.until_done("a", 10) == 10 + 10 + 5
    assert backlog.until_done("b", 10) == 20  # the other tenant is one
    assert backlog.until_done("b", 5000) == 5000 + 1005


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 99) | st.none()), max_size=40))
def test_the_sums_are_those_of_what_is_left(changes: list[tuple[str, int, int | None]]) -> None:
    """After any history of new work, progress and ends; without requests nothing is left."""
    backlog, model = Backlog(), dict[tuple[str, int], int]()
    for tenant, key, work in changes:
        if work is None:
            backlog.remove(tenant, key)
            model.pop((tenant, key), None)
        else:
            backlog.put(tenant, key, work)
            model[tenant, key] = work
        assert backlog.total == sum(model.values())
        assert backlog.tenants == len({tenant for tenant, _ in model})
        assert backlog.until_done("new", 10**9) == 10**9 + sum(model.values())
    for tenant, key in model:
        backlog.remove(tenant, key)
    assert (backlog.total, backlog.tenants) == (0, 0)


def test_the_refused_come_back_one_after_the_other() -> None:
    """A place a second: the first caller in a second, the next a second later, while the time goes on."""
    returns = Returns(lambda: 0.0)
    assert [returns.after_s("t", 100.0, 1.0, 60.0) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert returns.after_s("t", 102.0, 1.0, 60.0) == 2.0
    assert returns.after_s("other", 102.0, 1.0, 60.0) == 1.0
    returns.forget("t")
    assert returns.after_s("t", 102.0, 1.0, 60.0) == 1.0


def test_nobody_is_sent_beyond_what_waits_now() -> None:
    """Whoever comes when as many are told to return as there are turns is spread over as long a time again."""
    draws = iter([0.0] * 4 + [0.0, 0.5, 1.0])
    returns = Returns(lambda: next(draws))
    assert [returns.after_s("t", 0.0, 1.0, 4.0) for _ in range(7)] == [1, 2, 3, 4, 4, 6, 8]


def test_waits_are_bounded_and_do_not_agree() -> None:
    """Never so short that everybody comes back at once, never over five minutes; drawn at random."""
    assert 0.1 <= Returns().after_s("t", 0.0, 0.0, 0.0) <= 0.12
    assert Returns().after_s("t", 0.0, 10**9, 10**9) == 300.0
    assert len({Returns().after_s("t", 0.0, 10.0, 100.0) for _ in range(5)}) > 1

"""Waits that are named to refused requests."""

from __future__ import annotations

import pytest
from lora_server.scheduler.throughput import Throughput


def test_a_place_is_free_after_the_mean_time_of_a_request() -> None:
    """Ten requests with 50 s of work among them: one ends every 5 s; of five lines, each is served every 25 s."""
    throughput = Throughput()
    throughput.observe(100, 1.0)
    assert throughput.seconds(5000) == pytest.approx(50)
    assert throughput.retry_after_s(5000, 10) == pytest.approx(5)
    assert throughput.retry_after_s(5000, 10, lines=5) == pytest.approx(25)


def test_before_the_first_step_it_is_a_guess() -> None:
    """A second, not zero and not an error."""
    assert Throughput().seconds(10) is None
    assert Throughput().retry_after_s(10, 1) == 1.0


def test_waits_are_bounded() -> None:
    """Never so short that everybody comes back at once, never over five minutes."""
    throughput = Throughput()
    throughput.observe(1, 1.0)
    assert throughput.retry_after_s(0, 1) == 0.1
    assert throughput.retry_after_s(10**9, 1) == 300.0


def test_the_latest_steps_count_most() -> None:
    """A server that has become twice as slow says so after some dozens of steps."""
    throughput = Throughput()
    throughput.observe(1, 1.0)
    for _ in range(40):
        throughput.observe(1, 2.0)
    assert throughput.seconds(1) == pytest.approx(2.0, rel=0.02)

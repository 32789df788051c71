"""What a step is taken to cost."""

from __future__ import annotations

from lora_server.scheduler.costs import StepCosts


def test_a_noisy_measurement_does_not_make_open_pages_cheaper_than_none() -> None:
    """Else a lone composition would flip between the ways of applying it."""
    costs = StepCosts()
    costs.observe("shape", 2, 0.010, slots=False)
    costs.observe("shape", 2, 0.007, slots=True)
    assert costs.step_s("shape", 2, slots=True) > costs.step_s("shape", 2, slots=False)


def test_a_measurement_above_the_floor_counts() -> None:
    """Pages that were measured to be dear are dear."""
    costs = StepCosts()
    costs.observe("shape", 2, 0.010, slots=False)
    costs.observe("shape", 2, 0.020, slots=True)
    assert costs.step_s("shape", 2, slots=True) == 0.020

"""What a step costs: measured at warm-up, kept up to date by every step, interpolated where nothing was measured.

Pure Python. Seconds of one batch, by (latent shape and text length), rows, and whether pages are open.
"""

from __future__ import annotations

from collections.abc import Hashable

_KEEP = 0.8
"""Share of the old estimate that a new measurement leaves."""
_SLOTS_GUESS = 1.15
_LEAST_SLOTS_FACTOR = 1.05
"""Open pages cost at least this much more than the base model (5 to 9% on an H200, more on the CPU), whatever one noisy
measurement says: else a lone composition would flip between the ways, and its picture by a level with them."""
_SECONDS_GUESS = 1.0
_MOST_CHANGE = 2.0
"""A measurement counts as at most this many times the estimate: a stall of the machine is not a cost."""


class StepCosts:
    """Estimates of step times and of the time that a change of merged weights takes."""

    def __init__(self) -> None:
        self.switch_s = 0.0
        self._seconds: dict[tuple[Hashable, bool], dict[int, float]] = {}
        self._fastest: dict[Hashable, float] = {}

    def observe(self, shape: Hashable, rows: int, seconds: float, *, slots: bool) -> None:
        """Notes that a step of *rows* rows took *seconds*."""
        known = self._seconds.setdefault((shape, slots), {})
        before = known.get(rows)
        if before is not None:
            seconds = _KEEP * before + (1 - _KEEP) * min(seconds, _MOST_CHANGE * before)
        known[rows] = seconds
        self._fastest[shape] = min(seconds, self._fastest.get(shape, seconds))

    def step_s(self, shape: Hashable, rows: int, *, slots: bool) -> float:
        """Estimates a step's seconds; always positive, and the same for the same measurements."""
        if slots and (shape, False) in self._seconds:
            return max(
                self._estimate_s(shape, rows, slots=True), _LEAST_SLOTS_FACTOR * self.step_s(shape, rows, slots=False)
            )
        return self._estimate_s(shape, rows, slots=slots)

    def _estimate_s(self, shape: Hashable, rows: int, *, slots: bool) -> float:
        known = self._seconds.get((shape, slots))
        if known:
            return _interpolated(known, rows)
        other = self._seconds.get((shape, not slots))
        if other:
            estimate = _interpolated(other, rows)
            return estimate * self._slots_factor() if slots else estimate / self._slots_factor()
        return _SECONDS_GUESS * rows * (self._slots_factor() if slots else 1.0)

    def fastest_s(self, shape: Hashable) -> float:
        """The least that any step of this shape has taken; 0 if there was none."""
        return self._fastest.get(shape, 0.0)

    def _slots_factor(self) -> float:
        """How much longer a step takes with open pages, over all that was measured both ways."""
        ratios = [
            seconds / self._seconds[shape, False][rows]
            for (shape, slots), known in self._seconds.items()
            if slots
            for rows, seconds in known.items()
            if rows in self._seconds.get((shape, False), {})
        ]
        return sum(ratios) / len(ratios) if ratios else _SLOTS_GUESS


def _interpolated(known: dict[int, float], rows: int) -> float:
    """Linear between the neighbours; below the least and above the most, in proportion to the rows."""
    if rows in known:
        return known[rows]
    below = max((each for each in known if each < rows), default=None)
    above = min((each for each in known if each > rows), default=None)
    if below is None:
        assert above is not None
        return known[above] if rows * 2 >= above else known[above] * rows / above
    if above is None:
        return known[below] * rows / below
    share = (rows - below) / (above - below)
    return known[below] * (1 - share) + known[above] * share

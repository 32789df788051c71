"""How fast work goes, measured. Pure Python.

The unit of work is one pixel of one image for one step: times at different sizes become comparable, roughly. One
thread observes, any thread may ask.
"""

from __future__ import annotations

import math

_MEMORY_S = 10.0
"""Work of so many seconds ago counts 1/e of the present."""


class Throughput:
    """Seconds that a pixel-step takes of late, with all that comes between the steps while there is work."""

    def __init__(self) -> None:
        self._totals: tuple[float, float] | None = None  # pixel-steps and seconds, weighted by age

    def observe(self, pixel_steps: int, seconds: float) -> None:
        """Notes that so many pixels of images took *seconds* for a step, and until the next one could begin."""
        done, lasted_s = self._totals or (0.0, 0.0)
        kept = math.exp(-seconds / _MEMORY_S)
        self._totals = done * kept + max(1, pixel_steps), lasted_s * kept + seconds

    def seconds(self, pixel_steps: int) -> float | None:
        """Estimates the seconds of so much work; None before the first step."""
        if self._totals is None:
            return None
        done, lasted_s = self._totals
        return lasted_s / done * pixel_steps

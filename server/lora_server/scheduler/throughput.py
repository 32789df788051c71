"""How fast work goes, measured, and from that how long a refused request should wait. Pure Python.

The unit of work is one pixel of one image for one step: times at different sizes become comparable, roughly. One
thread observes, any thread may ask.
"""

from __future__ import annotations

_KEEP = 0.9
"""Share of the old estimate that a new step leaves."""
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 300.0
_GUESS_S = 1.0


class Throughput:
    """Seconds that a pixel-step takes in the batches of late."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def observe(self, pixel_steps: int, seconds: float) -> None:
        """Notes that a batch with so many pixels took *seconds* for its step."""
        each = seconds / max(1, pixel_steps)
        self._seconds = each if self._seconds is None else _KEEP * self._seconds + (1 - _KEEP) * each

    def seconds(self, pixel_steps: int) -> float | None:
        """Estimates the seconds of so much work; None before the first step."""
        return None if self._seconds is None else self._seconds * pixel_steps

    def retry_after_s(self, pixel_steps: int, requests: int, lines: int = 1) -> float:
        """Estimates when a place in a line gets free, with so much work left in so many *requests*.

        A place is freed whenever a request starts, which is as often as one ends: in the mean, after the time of one.
        A tenant's own line is served once in as many turns as there are *lines*. 0.1 to 300 s; 1 s before the first
        step.
        """
        work_s = self.seconds(pixel_steps)
        mean_s = _GUESS_S if work_s is None else work_s / max(1, requests)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, mean_s * max(1, lines)))

"""What callers of a server behind a lock wait for: one queue, one image at a time, Poisson arrivals.

The ways that users have today serve one request at a time, so their latency under load follows from their service time
alone: the queue is simulated by Lindley's recursion (Lindley 1952), exactly what a lock does.
"""

from __future__ import annotations

import random

_ARRIVALS = 40_000


def p95_s(service_s: float, rate: float, seed: int = 0) -> float:
    """95th percentile of wait and service, in seconds, at *rate* arrivals a second."""
    rng = random.Random(seed)
    wait_s, latencies = 0.0, []
    for _ in range(_ARRIVALS):
        latencies.append(wait_s + service_s)
        wait_s = max(0.0, wait_s + service_s - rng.expovariate(rate))
    return sorted(latencies)[int(0.95 * _ARRIVALS)]


def highest_rate(service_s: float, factor: float = 2.0) -> float:
    """The most arrivals a second at which the 95th percentile is at most *factor* times the service time."""
    low, high = 0.0, 1 / service_s
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if p95_s(service_s, middle) <= factor * service_s else (low, middle)
    return low

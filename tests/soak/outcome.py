"""How one request or one change went, as callers and operators tell it, and what of it is in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

UNAVAILABLE = frozenset({"UnavailableError", "ServerNotReadyError"})
RECONNECT_S = 15.0
"""How long after a restart a client may still say that it cannot reach the server: gRPC's pause between attempts."""

_CHANGING_FILE = frozenset({"AdapterDigestMismatchError", "AdapterMalformedError", "AdapterSourceNotFoundError"})
"""What a request may get for a name whose files are being replaced in place, until that is acknowledged."""

_VERSION_GONE = frozenset({"AdapterNotFoundError", "AdapterDigestMismatchError"})

ALLOWED: Mapping[str, Collection[str]] = {
    "select": _VERSION_GONE,
    "hurry": {"DeadlineExceededError", "QueueFullError"},  # the latter if the work before it leaves no time
    "unknown": {"AdapterNotFoundError"},
    "invalid": {"InvalidRequestError"},
    "pin": {"CacheExhaustedError"},
}
"""The errors that a kind of request may end with; all others only beside a kill."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request went; monotonic seconds.

    Attributes:
        error: The class of the client's exception; empty on success.
        name, digest: The name with versions that was asked for by name, and what was applied for it.
        faults: What was wrong with the answer.
    """

    kind: str
    began_s: float
    ended_s: float
    error: str = ""
    detail: str = ""
    images: int = 0
    name: str = ""
    digest: str = ""
    faults: tuple[str, ...] = ()

    @property
    def drew(self) -> bool:
        """Whether it got pictures."""
        return not self.error and self.images > 0


class OutageLike(Protocol):
    """A time without a server."""

    killed_s: float
    serving_s: float | None


def is_expected(outcome: Outcome, outages: Sequence[OutageLike]) -> bool:
    """Whether the way it ended is in order, answers aside."""
    if not outcome.error or outcome.error in ALLOWED.get(outcome.kind, ()):
        return True
    if outcome.name == "filed" and outcome.error in _CHANGING_FILE:
        return True
    return outcome.error in UNAVAILABLE and any(_beside(outcome, outage) for outage in outages)


def _beside(outcome: Outcome, outage: OutageLike) -> bool:
    over_s = outage.serving_s + RECONNECT_S if outage.serving_s is not None else float("inf")
    return outcome.ended_s >= outage.killed_s and outcome.began_s <= over_s

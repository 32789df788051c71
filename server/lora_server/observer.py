"""What the house tells of itself while it works: one small protocol, and its silent form.

Rooms that work (rpc, engine, adapters) call it with facts and durations; who listens (metrics, logs, traces) lives in
`monitoring`, and nobody here knows them. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lora_server.types import ApplicationWay, AppliedAdapter, GenerationRequest, GenerationStats

OK = "OK"
"""The outcome of what succeeded; all other outcomes are names of values of ErrorReason."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request's way: `queue`, `adapter_wait`, `encode`, `denoise` or `decode`; monotonic seconds."""

    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A request that has ended, however it ended.

    Attributes:
        request: What was asked for.
        outcome: OK, or the reason of its error.
        adapters: The adapters as they were applied; empty if they were never resolved.
        stats: What it cost until then.
        stages: Its stages in the order of their beginning, as far as it got; they may overlap.
        accepted_s, ended_s: When it was accepted and when it ended, monotonic seconds.
    """

    request: GenerationRequest
    outcome: str
    adapters: tuple[AppliedAdapter, ...]
    stats: GenerationStats
    stages: tuple[Stage, ...]
    accepted_s: float
    ended_s: float


class Observer(Protocol):
    """Who is told. Every method may be called from any thread, returns at once and never raises."""

    def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """An RPC ended with a canonical code, and a reason if it failed."""
        ...

    def request_refused(self, request_id: str, tenant: str, reason: str) -> None:
        """A request for images was not accepted."""
        ...

    def request_ended(self, summary: RequestSummary) -> None:
        """An accepted request ended; told once for each."""
        ...

    def step_ended(self, way: ApplicationWay, rows: int, seconds: float) -> None:
        """A batch of so many rows made a step."""
        ...

    def adapter_loaded(self, source: str, outcome: str, seconds: float) -> None:
        """An adapter was read, checked and converted, or could not be; *source* is the kind of place it came from."""
        ...

    def out_of_memory(self, stage: str) -> None:
        """The device ran out of memory in `upload`, `encode`, `step`, `preview` or `decode`."""
        ...

    def engine_restarted(self) -> None:
        """The engine died and began anew."""
        ...


class SilentObserver:
    """Tells nobody."""

    def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """Ignored."""

    def request_refused(self, request_id: str, tenant: str, reason: str) -> None:
        """Ignored."""

    def request_ended(self, summary: RequestSummary) -> None:
        """Ignored."""

    def step_ended(self, way: ApplicationWay, rows: int, seconds: float) -> None:
        """Ignored."""

    def adapter_loaded(self, source: str, outcome: str, seconds: float) -> None:
        """Ignored."""

    def out_of_memory(self, stage: str) -> None:
        """Ignored."""

    def engine_restarted(self) -> None:
        """Ignored."""

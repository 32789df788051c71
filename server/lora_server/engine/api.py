"""What the engine promises to those who bring it requests: the seam between transport and engine.

The handlers know these protocols only; a remote engine (another process, Ray) would implement them as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lora_server.types import EngineInfo, GenerationEvent, GenerationRequest, ModelInfo, QueueInfo


class Subscription(Protocol):
    """One reader's place in the events of a job. Not thread-safe: one reader."""

    def poll(self) -> list[GenerationEvent]:
        """Returns the events since the last call, oldest first; never blocks.

        Progress, queue positions and previews are coalesced to the latest, so a slow reader costs no memory. Images
        and stats are never lost, also for a reader that joins late. An empty list means: wait for the wake-up.

        Raises:
            LoraServerError: If the job failed, after all its events were returned.
        """
        ...

    @property
    def finished(self) -> bool:
        """Whether `poll` has returned the last event (stats)."""
        ...

    def close(self) -> None:
        """Leaves the job. If nobody reads it any more and it is not finished, it is cancelled within one step.

        Idempotent; never blocks.
        """
        ...


class Job(Protocol):
    """A request that the engine has accepted."""

    @property
    def request(self) -> GenerationRequest:
        """The request; the first one, if several calls share the job."""
        ...

    def keep(self) -> Callable[[], None]:
        """Counts the job's images as unread, against its tenant, until the returned function is called.

        For whoever holds images on after the subscription has closed. The function is idempotent and thread-safe.
        """
        ...

    def subscribe(self, wake: Callable[[], None]) -> Subscription:
        """Joins the job; *wake* is called when `poll` has news, from any thread, perhaps often, and must not block."""
        ...


class Engine(Protocol):
    """Makes images; every method is thread-safe and returns at once."""

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        ...

    def submit(self, request: GenerationRequest) -> Job:
        """Accepts a request, or joins the job that already has its request id.

        Raises:
            QueueFullError: If too many requests wait.
            ServerDrainingError: If the engine takes no new work.
            InvalidRequestError: If the request id belongs to a job with other parameters or adapters.
        """
        ...

    def queue_info(self) -> QueueInfo:
        """Returns how many requests wait and run."""
        ...

    def info(self) -> EngineInfo:
        """Returns what the engine has done since its start."""
        ...

    def drain(self) -> None:
        """Takes no new work from now on; what was accepted goes on. Idempotent."""
        ...

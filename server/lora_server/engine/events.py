"""What a job tells its readers: an event log of bounded size that any number of readers may follow.

Owns ordering, coalescing, replay for late readers, and who still reads. Knows nothing of how events come to be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from lora_server.errors import LoraServerError
from lora_server.types import (
    GenerationEvent,
    ImageEvent,
    PreviewEvent,
    StatsEvent,
)


class EventLog:
    """The events of one job; thread-safe.

    Events of one kind about one thing replace each other (a slow reader sees the latest progress), except images and
    stats, which are published once. So memory is bounded by the images, whoever reads however slowly.
    """

    def __init__(self, on_abandoned: Callable[[], None]) -> None:
        """*on_abandoned* is called, without locks held, when the last reader leaves an unfinished log."""
        self._on_abandoned = on_abandoned
        self._lock = threading.Lock()
        self._latest: dict[Hashable, tuple[int, GenerationEvent]] = {}
        self._sequence = 0
        self._error: LoraServerError | None = None
        self._complete = False
        self._abandoned = False
        self._reserved = 0
        self._readers: set[LogSubscription] = set()

    @property
    def complete(self) -> bool:
        """Whether stats or an error has been published."""
        with self._lock:
            return self._complete

    @property
    def size_bytes(self) -> int:
        """Bytes of the images held."""
        with self._lock:
            events = [event for _, event in self._latest.values()]
        return sum(len(event.image.data) for event in events if isinstance(event, ImageEvent))

    def publish(self, event: GenerationEvent) -> None:
        """Appends *event*, in place of an older one of its kind; ignored after the end."""
        with self._lock:
            if self._complete:
                return
            self._sequence += 1
            self._latest[_kind(event)] = (self._sequence, event)
            self._complete = isinstance(event, StatsEvent)
            if self._complete:
                self._drop_previews()
        self._wake_readers()

    def fail(self, error: LoraServerError) -> None:
        """Ends the log with *error*; ignored after the end."""
        with self._lock:
            if self._complete:
                return
            self._complete = True
            self._error = error
        self._wake_readers()

    def reserve(self) -> bool:
        """Keeps a place for a reader who is about to subscribe; False if the last reader has left already.

        Closes the gap between finding a job and joining it, in which the others might leave and cancel it.
        """
        with self._lock:
            if self._abandoned:
                return False
            self._reserved += 1
            return True

    def subscribe(self, wake: Callable[[], None]) -> LogSubscription:
        """Adds a reader, who sees everything that is held; uses up one reservation, if there is one."""
        reader = LogSubscription(self, wake)
        with self._lock:
            self._reserved = max(0, self._reserved - 1)
            self._readers.add(reader)
        wake()
        return reader

    def since(self, sequence: int) -> tuple[int, list[GenerationEvent], LoraServerError | None, bool]:
        """Returns (new place, events after *sequence*, the error if the log ended with one, whether it ended)."""
        with self._lock:
            news = sorted((entry for entry in self._latest.values() if entry[0] > sequence), key=lambda entry: entry[0])
            return self._sequence, [event for _, event in news], self._error, self._complete

    def leave(self, reader: LogSubscription) -> None:
        """Removes a reader; the last one to leave an unfinished log abandons it."""
        with self._lock:
            self._readers.discard(reader)
            abandoned = not (self._readers or self._reserved or self._complete or self._abandoned)
            self._abandoned = self._abandoned or abandoned
        if abandoned:
            self._on_abandoned()

    def _drop_previews(self) -> None:
        self._latest = {kind: entry for kind, entry in self._latest.items() if not isinstance(entry[1], PreviewEvent)}

    def _wake_readers(self) -> None:
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.wake()


class LogSubscription:
    """One reader's place in a log: the engine's `Subscription`."""

    def __init__(self, log: EventLog, wake: Callable[[], None]) -> None:
        self._log = log
        self.wake = wake
        self._sequence = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether `poll` has returned the last event (stats)."""
        return self._finished

    def poll(self) -> list[GenerationEvent]:
        """Returns the events since the last call, oldest first; raises the job's error after its last event."""
        self._sequence, events, error, complete = self._log.since(self._sequence)
        if error is not None and not events:
            raise error
        self._finished = complete and error is None
        if error is not None:
            self.wake()  # The error is due at the next poll.
        return events

    def close(self) -> None:
        """Leaves the log; idempotent, never blocks."""
        self._log.leave(self)


def _kind(event: GenerationEvent) -> Hashable:
    """Events of equal kind replace each other."""
    if isinstance(event, PreviewEvent):
        return PreviewEvent, event.image_index
    if isinstance(event, ImageEvent):
        return ImageEvent, event.image.index
    return type(event).__name__

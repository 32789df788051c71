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

    def __init__(self, on_abandoned: Callable[[], None], on_held: Callable[[int], None] = lambda _: None) -> None:
        """Both are called without locks held, from any thread.

        *on_abandoned* when the last reader leaves an unfinished log; *on_held* with the bytes of images that have come
        to be held for readers who have not taken them, or, negative, are no more.
        """
        self._on_abandoned = on_abandoned
        self._on_held = on_held
        self._held_bytes = 0
        self._kept = 0
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
            held = self._newly_held() if isinstance(event, ImageEvent) else 0
        self._on_held(held)
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
            held = self._newly_held()
        self._on_held(held)
        return True

    def keep(self) -> Callable[[], None]:
        """Counts the images as held until the returned function is called, once or often, whoever reads them."""
        with self._lock:
            self._kept += 1
            held = self._newly_held()
        self._on_held(held)
        kept = [True]

        def let_go() -> None:
            with self._lock:
                self._kept -= bool(kept)
                kept.clear()
                held = self._newly_held()
            self._on_held(held)

        return let_go

    def subscribe(self, wake: Callable[[], None]) -> LogSubscription:
        """Adds a reader, who sees everything that is held; uses up one reservation, if there is one."""
        reader = LogSubscription(self, wake)
        with self._lock:
            self._reserved = max(0, self._reserved - 1)
            self._readers.add(reader)
            held = self._newly_held()
        self._on_held(held)
        wake()
        return reader

    def read(self, reader: LogSubscription) -> tuple[list[GenerationEvent], LoraServerError | None, bool]:
        """Returns (events that are new to *reader*, the error if the log ended with one, whether it ended).

        What it got the last time counts as taken from now on.
        """
        with self._lock:
            before, reader.taken, reader.given = reader.taken, reader.given, self._sequence
            news = sorted(
                (entry for entry in self._latest.values() if entry[0] > reader.taken), key=lambda entry: entry[0]
            )
            held = self._newly_held() if reader.taken != before else 0
            found = [event for _, event in news], self._error, self._complete
        self._on_held(held)
        return found

    def leave(self, reader: LogSubscription) -> None:
        """Removes a reader; the last one to leave an unfinished log abandons it."""
        with self._lock:
            self._readers.discard(reader)
            abandoned = not (self._readers or self._reserved or self._complete or self._abandoned)
            self._abandoned = self._abandoned or abandoned
            held = self._newly_held()
        self._on_held(held)
        if abandoned:
            self._on_abandoned()

    def _newly_held(self) -> int:
        """Works out what is held now; returns by how much that is more than before."""
        places = [reader.taken for reader in self._readers]
        if self._reserved or self._kept:
            places.append(0)
        least = min(places, default=self._sequence)
        images = [(place, event) for place, event in self._latest.values() if isinstance(event, ImageEvent)]
        now = sum(len(event.image.data) for place, event in images if place > least)
        change, self._held_bytes = now - self._held_bytes, now
        return change

    def _drop_previews(self) -> None:
        self._latest = {kind: entry for kind, entry in self._latest.items() if not isinstance(entry[1], PreviewEvent)}

    def _wake_readers(self) -> None:
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.wake()


class LogSubscription:
    """One reader's place in a log: the engine's `Subscription`.

    Attributes:
        given: The last event that it got; the log's own, under its lock.
        taken: The last one that it is done with; the same.
    """

    def __init__(self, log: EventLog, wake: Callable[[], None]) -> None:
        self._log = log
        self.wake = wake
        self.given = self.taken = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether `poll` has returned the last event (stats)."""
        return self._finished

    def poll(self) -> list[GenerationEvent]:
        """Returns the events since the last call, oldest first; raises the job's error after its last event."""
        events, error, complete = self._log.read(self)
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

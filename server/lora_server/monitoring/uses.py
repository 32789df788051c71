"""Which adapters are used most: counts that stay small, however many adapters there are. Pure Python, thread-safe."""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Iterable

from lora_server.observer import RequestSummary, SilentObserver

OTHER = "other"
_MAX_TRACKED = 4096


class AdapterUses(SilentObserver):
    """Uses by accepted requests, by adapter name, since the start.

    | invariant | |
    |---|---|
    | names that are tracked | at most 4,096; the least used are forgotten first |
    | names with a label | at most *max_labels*; a newcomer takes the place of the least used once it is used more |
    | a label's count | grows from 0 as of when it got its place, so that no use is counted twice |
    """

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._labelled: dict[str, int] = {}
        self._other = 0

    def request_ended(self, summary: RequestSummary) -> None:
        """Counts the adapters of a request."""
        self.note(adapter.name for adapter in summary.adapters)

    def note(self, names: Iterable[str]) -> None:
        """Counts one use of each of *names*."""
        with self._lock:
            for name in names:
                self._counts[name] += 1
                self._count_label(name)
                if len(self._counts) > _MAX_TRACKED:
                    self._forget_some()

    def top(self, count: int) -> list[tuple[str, int]]:
        """Returns the most used adapters with their uses, the most used first."""
        with self._lock:
            return heapq.nsmallest(count, self._counts.items(), key=lambda item: (-item[1], item[0]))

    def labelled(self) -> dict[str, int]:
        """Returns the counts to publish, by label; `other` has the rest."""
        with self._lock:
            return {**self._labelled, OTHER: self._other}

    def _forget_some(self) -> None:
        unlabelled = (item for item in self._counts.items() if item[0] not in self._labelled)
        for name, _ in heapq.nsmallest(_MAX_TRACKED // 4, unlabelled, key=lambda item: item[1]):
            del self._counts[name]

    def _count_label(self, name: str) -> None:
        if name not in self._labelled and not self._gets_a_label(name):
            self._other += 1
            return
        self._labelled[name] = self._labelled.get(name, 0) + 1

    def _gets_a_label(self, name: str) -> bool:
        if name == OTHER or not self._max_labels:  # an adapter may have that very name
            return False
        if len(self._labelled) < self._max_labels:
            return True
        least = min(self._labelled, key=lambda each: self._counts[each])
        if self._counts[name] <= self._counts[least]:
            return False
        del self._labelled[least]
        return True

"""Which adapters are used most: counts that stay small, however many adapters there are. Pure Python, thread-safe."""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from lora_server.observer import RequestSummary, SilentObserver

OTHER = "other"
_MAX_TRACKED = 4096
_Key = tuple[str | None, str]
"""The tenant that alone finds a name, None for what is registered, and the name."""


class AdapterUses(SilentObserver):
    """Uses by accepted requests, by adapter name, since the start; of names that only one tenant finds, by tenant.

    | invariant | |
    |---|---|
    | names that are tracked | at most 4,096; the least used are forgotten first |
    | names with a label | at most *max_labels*; a newcomer takes the place of the least used once it is used more |
    | a label's count | grows from 0 as of when it got its place, so that no use is counted twice |
    """

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._lock = threading.Lock()
        self._counts: Counter[_Key] = Counter()
        self._labelled: dict[_Key, int] = {}
        self._other = 0

    def request_ended(self, summary: RequestSummary) -> None:
        """Counts the adapters of a request."""
        tenant = summary.request.tenant
        self._note((tenant if adapter.on_demand else None, adapter.name) for adapter in summary.adapters)

    def note(self, names: Iterable[str]) -> None:
        """Counts one use of each of *names*, which are registered."""
        self._note((None, name) for name in names)

    def _note(self, used: Iterable[_Key]) -> None:
        with self._lock:
            for key in used:
                self._counts[key] += 1
                self._count_label(key)
                if len(self._counts) > _MAX_TRACKED:
                    self._forget_some()

    def top(self, tenant: str | None = None) -> Iterator[tuple[str, int, bool]]:
        """Yields the most used adapters first: name, uses, and whether the name is one that only *tenant* finds."""
        with self._lock:
            counts = list(self._counts.items())
        ranked = [(-uses, name, owner is not None) for (owner, name), uses in counts if owner in (None, tenant)]
        heapq.heapify(ranked)
        while ranked:
            uses, name, is_own = heapq.heappop(ranked)
            yield name, -uses, is_own

    def labelled(self) -> dict[str, int]:
        """Returns the counts to publish, by label; `other` has the rest."""
        with self._lock:
            published: Counter[str] = Counter({OTHER: self._other})
            for (_, name), uses in self._labelled.items():
                published[name] += uses
            return dict(published)

    def _forget_some(self) -> None:
        unlabelled = (item for item in self._counts.items() if item[0] not in self._labelled)
        for key, _ in heapq.nsmallest(_MAX_TRACKED // 4, unlabelled, key=lambda item: item[1]):
            del self._counts[key]

    def _count_label(self, key: _Key) -> None:
        if key not in self._labelled and not self._gets_a_label(key):
            self._other += 1
            return
        self._labelled[key] = self._labelled.get(key, 0) + 1

    def _gets_a_label(self, key: _Key) -> bool:
        if key[1] == OTHER or not self._max_labels:  # an adapter may have that very name
            return False
        if len(self._labelled) < self._max_labels:
            return True
        least = min(self._labelled, key=lambda each: self._counts[each])
        if self._counts[key] <= self._counts[least]:
            return False
        del self._labelled[least]
        return True

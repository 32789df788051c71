"""What the server has acknowledged: names, versions, scales and pins; and which version a request may have got."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lora_client import Adapter
from lora_client.errors import AdapterNotFoundError, UnavailableError


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a registered name."""

    digest: str
    pin: str | None
    default_scale: float


class Interrupted(Exception):
    """A change was under way when the server died: it may have happened or not."""


@dataclass(slots=True)
class _Span:
    """A time in which a name may have had a version; monotonic seconds, *until_s* None is now."""

    digest: str
    since_s: float
    until_s: float | None = None


@dataclass(slots=True)
class Ledger:
    """The operators' books. One change of a name at a time; asyncio only."""

    clock: Callable[[], float] = time.monotonic
    known: dict[str, Entry | None] = field(default_factory=dict)
    acknowledged: int = 0
    _pending: dict[str, Entry | None] = field(default_factory=dict)
    _spans: dict[str, list[_Span]] = field(default_factory=dict)

    @asynccontextmanager
    async def change(self, name: str, after: Entry | None) -> AsyncIterator[None]:
        """Wraps the call that makes *name* what *after* says; None unloads it. An error of the call changes nothing.

        Raises:
            Interrupted: If the server died meanwhile, so that `settle` has to find out.
        """
        before = self.known.get(name)
        span = self._may_be(name, before, after)
        try:
            yield
        except (UnavailableError, AdapterNotFoundError) as error:
            if isinstance(error, AdapterNotFoundError) and not (after is None and before is not None):
                self._never(name, span)
                raise
            self._pending[name] = after  # an unload that is tried again after a kill may find it done
            raise Interrupted(name) from error
        except BaseException:
            self._never(name, span)
            raise
        self.known[name] = after
        self.acknowledged += 1
        self._is(name, after)

    def doubtful(self, name: str) -> bool:
        """Whether the outcome of a change of *name* is unknown."""
        return name in self._pending

    def settle(self, adapters: Iterable[Adapter]) -> list[str]:
        """Compares with what the server lists, once no change is under way; says what was lost or is not as it was."""
        found = {adapter.name: _entry(adapter) for adapter in adapters}
        states = {adapter.name: adapter.current.state for adapter in adapters}
        faults = []
        for name, entry in self.known.items():
            accepted = [entry, *([self._pending[name]] if name in self._pending else [])]
            if found.get(name) not in accepted:
                faults.append(f"{name} is {found.get(name)}; acknowledged was {' or '.join(map(str, accepted))}")
            elif found.get(name) and (states[name] == "failed" or _unpinned(found[name], states[name])):
                faults.append(f"{name} is {states[name]}, and {found[name]} was acknowledged")
            self.known[name] = found.get(name)
            self._is(name, found.get(name))
        self._pending.clear()
        return faults

    def possible(self, name: str, digest: str, began_s: float, ended_s: float) -> bool:
        """Whether a request for *name* in that time may have got *digest*."""
        return any(
            span.digest == digest and span.since_s <= ended_s and (span.until_s is None or span.until_s >= began_s)
            for span in self._spans.get(name, ())
        )

    def _may_be(self, name: str, before: Entry | None, after: Entry | None) -> _Span | None:
        if after is None or (before is not None and before.digest == after.digest):
            return None
        span = _Span(after.digest, self.clock())
        self._spans.setdefault(name, []).append(span)
        return span

    def _never(self, name: str, span: _Span | None) -> None:
        if span is not None:
            self._spans[name].remove(span)

    def _is(self, name: str, entry: Entry | None) -> None:
        """Ends the spans of all other versions; unloading ends none, as running requests may finish."""
        for span in self._spans.get(name, ()):
            if span.until_s is None and entry is not None and span.digest != entry.digest:
                span.until_s = self.clock()
        if entry is not None and not any(
            span.until_s is None and span.digest == entry.digest for span in self._spans.get(name, ())
        ):
            self._spans.setdefault(name, []).append(_Span(entry.digest, self.clock()))


def _entry(adapter: Adapter) -> Entry:
    pin = adapter.pin.level if adapter.pin is not None else None
    return Entry(adapter.current_digest, pin, adapter.default_scale)


def _unpinned(entry: Entry, state: str) -> bool:
    return entry.pin is not None and state not in ("cached", "resident")

"""What the manager takes and gives: the loader's seam, resolved uses, leases. Pure Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lora_server.adapters.records import Record
from lora_server.adapters.source import AdapterFiles, Signature
from lora_server.types import (
    OPERATOR,
    AdapterInfo,
    AdapterState,
    AppliedAdapter,
    ComponentSummary,
    Digest,
    LoadReport,
    Viewer,
)


class Weights(Protocol):
    """What the cache holds, opaque to it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of host memory."""
        ...

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        ...

    @property
    def components(self) -> tuple[ComponentSummary, ...]:
        """What is adapted in each component."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What a loader makes of a folder.

    Attributes:
        modules: Paths of the modules that it changes in the denoiser.
        report: What was understood of its files; its trigger words are no part of the digest.
    """

    digest: Digest
    weights: Weights
    signature: Signature
    modules: tuple[str, ...] = ()
    report: LoadReport | None = None


class Loader(Protocol):
    """Where adapters come from; every method may block and raises domain errors."""

    def locate(self, path: str | Path) -> Path:
        """Returns the folder that a client's path, a text, means; or a Path itself, which it has returned before."""
        ...

    def signature(self, folder: Path) -> Signature:
        """Returns what changes when a file of the adapter does; costs a few stats."""
        ...

    def files(self, folder: Path) -> AdapterFiles:
        """Returns the bytes of the adapter's files, unchecked."""
        ...

    def load(self, folder: Path) -> LoadedAdapter:
        """Reads, checks and converts the adapter."""
        ...

    def load_partial(self, folder: Path) -> LoadedAdapter:
        """The same, but leaves out tensors whose module the model has not; the report names them."""
        ...


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """One use, fixed to a version.

    Attributes:
        applied: Name, id, digest and scale, the default scale filled in.
        state_on_arrival: Where the version was when the request came.
        load_time_s: Wait for it to be read, checked and converted; 0 if it was cached.
        size_bytes: Bytes of its weights.
        trigger_words: What is to be put in front of the prompt; empty unless the use asks for it.
        found: The record by which *viewer*'s request has found it; None for what no request asks for.
    """

    applied: AppliedAdapter
    state_on_arrival: AdapterState
    load_time_s: float
    size_bytes: int
    trigger_words: tuple[str, ...] = ()
    found: Record | None = field(default=None, compare=False, repr=False)
    viewer: Viewer = OPERATOR


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """An adapter as registered, and how long reading it took (0 if it was cached)."""

    adapter: AdapterInfo
    load_time_s: float


class AdapterLease:
    """A request's hold on its versions: all of them, or none. A context manager."""

    def __init__(self, weights: Mapping[Digest, Weights], release: Callable[[], None]) -> None:
        self.weights = weights
        self._release = release
        self._lock = threading.Lock()
        self._held = True

    def release(self) -> None:
        """Gives the versions back; idempotent, thread-safe."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._release()

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

"""A loader in the place of the disk: folders are a dictionary, and a test decides when a read ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.source import Signature
from lora_server.errors import AdapterMalformedError, AdapterSourceNotFoundError
from lora_server.types import ComponentSummary


@dataclass(frozen=True)
class FakeWeights:
    """Weights of a given size."""

    size_bytes: int
    rank: int = 4
    components: tuple[ComponentSummary, ...] = ()


class MemoryLoader:
    """Folders by path -> (content, size in bytes); the content `bad` is malformed, a missing path has vanished."""

    def __init__(self, folders: dict[str, tuple[str, int]] | None = None) -> None:
        self.folders = {f"/{name}": (name, 10) for name in "abcdef"} if folders is None else folders
        self.loads: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def locate(self, path: str | Path) -> Path:
        return Path(path)

    def signature(self, folder: Path) -> Signature:
        content, size = self._entry(folder)
        return ((content, size, 0, 0),)

    def load(self, folder: Path) -> LoadedAdapter:
        gate = self._gates.get(str(folder))
        if gate is not None:
            assert gate.wait(20), "a test forgot to open a gate"
        content, size = self._entry(folder)
        self.loads.append(str(folder))
        if content == "bad":
            raise AdapterMalformedError(str(folder), "is bad", "key")
        return LoadedAdapter(f"sha256:{content}", FakeWeights(size), ((content, size, 0, 0),))

    @contextmanager
    def held_back(self, path: str) -> Iterator[None]:
        """Reads of *path* do not end before the block does."""
        gate = self._gates[path] = threading.Event()
        try:
            yield
        finally:
            del self._gates[path]
            gate.set()

    def _entry(self, folder: Path) -> tuple[str, int]:
        entry = self.folders.get(str(folder))
        if entry is None:
            raise AdapterSourceNotFoundError(str(folder))
        return entry

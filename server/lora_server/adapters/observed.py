"""A loader that tells how long each load took and how it ended. Knows nothing of what is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lora_server.adapters.api import LoadedAdapter, Loader
from lora_server.adapters.source import AdapterFiles, Signature
from lora_server.errors import LoraServerError
from lora_server.observer import OK, Observer

FOLDER, FILE = "folder", "file"
"""The kinds of sources: several files that belong together, or a bare one."""


class ObservedLoader:
    """Passes everything on to *loader*; implements the manager's `Loader`."""

    def __init__(self, loader: Loader, observer: Observer) -> None:
        self._loader = loader
        self._observer = observer

    def locate(self, path: str | Path) -> Path:
        """Passed on."""
        return self._loader.locate(path)

    def signature(self, folder: Path) -> Signature:
        """Passed on."""
        return self._loader.signature(folder)

    def files(self, folder: Path) -> AdapterFiles:
        """Passed on."""
        return self._loader.files(folder)

    def load(self, folder: Path) -> LoadedAdapter:
        """Passed on, and told of."""
        return self._told(lambda: self._loader.load(folder), folder)

    def load_partial(self, folder: Path) -> LoadedAdapter:
        """Passed on, and told of."""
        return self._told(lambda: self._loader.load_partial(folder), folder)

    def _told(self, load: Callable[[], LoadedAdapter], place: Path) -> LoadedAdapter:
        began_s, outcome = time.monotonic(), "ENGINE_FAILURE"
        try:
            loaded = load()
            outcome = OK
        except LoraServerError as error:
            outcome = error.reason
            raise
        finally:
            source = FILE if place.suffix == ".safetensors" else FOLDER
            self._observer.adapter_loaded(source, outcome, time.monotonic() - began_s)
        return loaded

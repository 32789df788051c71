"""One input of the fuzzer, from bytes to a verdict: what atheris mutates and what the corpus test replays.

An input is a folder in a frame: a byte of flags, a configuration with its length, weights. It goes through the true
loader from the disk, so that every reader behind that seam is covered, whichever it is.
"""

from __future__ import annotations

import resource
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.source import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.errors import LoraServerError
from lora_server.models.base import adapter_targets

from tests.factories import TinyNet

MAX_SECONDS = 2.0
SLACK_BYTES = 16 * 1024 * 1024
IN_SUBFOLDER, NO_CONFIG, NO_WEIGHTS = 1, 2, 4
_FRAME = struct.Struct("<BI")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an input; *error* is the domain error's class, or empty."""

    error: str
    seconds: float
    grown_bytes: int
    allowed_bytes: int

    def fault(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.seconds > MAX_SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.grown_bytes > self.allowed_bytes:
            return f"took {self.grown_bytes} bytes, over {self.allowed_bytes}"
        return ""


def frame(config: bytes, weights: bytes, flags: int = 0) -> bytes:
    """Puts a folder into an input."""
    return _FRAME.pack(flags, len(config)) + config + weights


class Harness:
    """A loader for a tiny model, and a folder that each input is written to."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="fuzz")
        self._folder = Path(self._root.name) / "adapter"
        (self._folder / "second").mkdir(parents=True)
        # The one place that knows how a loader is made.
        self._loader = AdapterLoader(
            AdapterRoots([self._folder.parent]),
            adapter_targets({"first": TinyNet(), "second": TinyNet()}),
            ("tiny", "tiny", "first"),
            torch.float32,
            LimitsConfig(),
        )

    def run(self, data: bytes) -> Verdict:
        """Loads an input; whatever is not a domain error is raised. Seconds are the thread's own, of the CPU."""
        size_bytes = self._write(data)
        grown_from, began_s, error, converted_bytes = _peak_bytes(), time.thread_time(), "", 0
        try:
            folder = self._loader.locate(str(self._folder))
            self._loader.signature(folder)
            converted_bytes = self._loader.load(folder).weights.size_bytes
        except LoraServerError as caught:
            error = type(caught).__name__
        seconds, grown_bytes = time.thread_time() - began_s, _peak_bytes() - grown_from
        return Verdict(error, seconds, grown_bytes, size_bytes + converted_bytes + SLACK_BYTES)

    def close(self) -> None:
        """Removes the folder."""
        self._root.cleanup()

    def _write(self, data: bytes) -> int:
        flags, length = _FRAME.unpack_from(data.ljust(_FRAME.size, b"\0"))
        body = data[_FRAME.size :]
        target = self._folder / "second" if flags & IN_SUBFOLDER else self._folder
        for path in self._folder.rglob("*.*"):
            path.unlink()
        if not flags & NO_CONFIG:
            (target / CONFIG_FILE).write_bytes(body[:length])
        if not flags & NO_WEIGHTS:
            (target / WEIGHTS_FILE).write_bytes(body[length:])
        return len(body)


def _peak_bytes() -> int:
    """The most memory that this process has ever had: what was taken and given back shows too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

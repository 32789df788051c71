"""One input of the fuzzer, from bytes to a verdict: what atheris mutates and what the corpus test replays.

An input is a folder in a frame: a byte of flags, a configuration with its length, weights; if a flag says so, the
cards beside them, and at the very end the cards' lengths. It goes through the true loader from the disk, strictly and
in part, and through `inspect` with and without a model, which must say the same: every reader behind those seams is
covered, whichever it is.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.formats.inputs import Model
from lora_server.adapters.formats.inspection import Inspection, Serving
from lora_server.adapters.formats.layouts.part import ModuleShape
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from lora_server.config import LimitsConfig
from lora_server.errors import LoraServerError
from lora_server.models.base import adapter_targets

from tests.factories import TinyNet

MAX_SECONDS = 2.0
SLACK_BYTES = 16 * 1024 * 1024
IN_SUBFOLDER, NO_CONFIG, NO_WEIGHTS, HAS_CARDS = 1, 2, 4, 8
_OF_THE_SERVERS_TYPE = re.compile(r"beyond the range of|times alpha / rank exceed")
"""What only a server can say, which knows its model's type."""
_FRAME, _CARD_LENGTHS = struct.Struct("<BI"), struct.Struct("<3I")
_CARDS = CARD_FILE, WEIGHTS_FILE.replace(".safetensors", ".json"), SETTINGS_FILE


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an input; *error* is the domain error's class of a strict load, or empty.

    Seconds are those of the slowest way it went.
    """

    error: str
    seconds: float
    grown_bytes: int
    allowed_bytes: int
    disagrees: str = ""

    def fault(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.seconds > MAX_SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.grown_bytes > self.allowed_bytes:
            return f"took {self.grown_bytes} bytes, over {self.allowed_bytes}"
        return self.disagrees


def frame(config: bytes, weights: bytes, flags: int = 0, cards: tuple[bytes, bytes, bytes] | None = None) -> bytes:
    """Puts a folder into an input; *cards* are its README.md, NAME.json and lora_inference.json."""
    if cards is None:
        return _FRAME.pack(flags, len(config)) + config + weights
    head = _FRAME.pack(flags | HAS_CARDS, len(config)) + config + weights
    return head + b"".join(cards) + _CARD_LENGTHS.pack(*map(len, cards))


class Harness:
    """A loader for a tiny model, and a folder that each input is written to."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="fuzz")
        self._folder = Path(self._root.name) / "adapter"
        (self._folder / "second").mkdir(parents=True)
        targets = adapter_targets({"first": TinyNet(), "second": TinyNet()})
        # The one place that knows how a loader is made.
        self._loader = AdapterLoader(
            AdapterRoots([self._folder.parent]),
            targets,
            ("tiny", "sd3", "first"),
            torch.float32,
            LimitsConfig(),
        )
        shapes = {
            component: {
                path: ModuleShape(each.out_features, each.in_features, each.kernel or (1, 1))
                for path, each in own.items()
            }
            for component, own in targets.items()
        }
        self._model = Model("tiny", "first", shapes, "sd3")

    def run(self, data: bytes) -> Verdict:
        """Loads and inspects an input; whatever is not a domain error is raised.

        Seconds are the thread's own, of the CPU. What is loaded strictly must be loaded in part too, and inspection
        with the model must say what a load says; without it nobody knows which sub-folders are components.
        """
        size_bytes, converted_bytes, slowest_s, grown_from = self._write(data), 0, 0.0, _peak_bytes()
        errors: dict[str, str] = {}
        sentences: dict[str, str] = {}
        for name, way in self._ways().items():
            began_s, errors[name] = time.thread_time(), ""
            try:
                converted_bytes = max(converted_bytes, way())
            except LoraServerError as caught:
                errors[name], sentences[name] = type(caught).__name__, str(caught)
            slowest_s = max(slowest_s, time.thread_time() - began_s)
        disagrees = "" if errors["load"] else errors["load_partial"] and f"load_partial says {errors['load_partial']}"
        for name, same in (("load", "inspect"), ("load_partial", "inspect in part")):
            told = sentences.get(name, "")
            if told != sentences.get(same, "") and not _OF_THE_SERVERS_TYPE.search(told):
                disagrees += f"; {name} says {told!r}, {same} {sentences.get(same, '')!r}"
        allowed_bytes = size_bytes + converted_bytes + SLACK_BYTES
        grown_bytes = _peak_bytes() - grown_from
        return Verdict(errors["load"], slowest_s, grown_bytes, allowed_bytes, disagrees)

    def _ways(self) -> dict[str, Callable[[], int]]:
        """What is done with an input, one after the other, each giving the bytes that it converted."""
        return {
            "load": lambda: self._load(self._loader.load),
            "load_partial": lambda: self._load(self._loader.load_partial),
            "inspect": lambda: self._inspect(self._model),
            "inspect in part": lambda: self._inspect(self._model, allow_partial=True),
            "inspect without a model": lambda: self._inspect(None),
        }

    def _load(self, load: Callable[[Path], LoadedAdapter]) -> int:
        folder = self._loader.locate(str(self._folder))
        self._loader.signature(folder)
        return load(folder).weights.size_bytes

    def _inspect(self, model: Model | None, *, allow_partial: bool = False) -> int:
        inspection = Inspection(self._folder, Serving(model), allow_partial=allow_partial)
        inspection.digest()
        json.dumps(dataclasses.asdict(inspection.report()), ensure_ascii=False).encode()
        return 0

    def close(self) -> None:
        """Removes the folder."""
        self._root.cleanup()

    def _write(self, data: bytes) -> int:
        flags, length = _FRAME.unpack_from(data.ljust(_FRAME.size, b"\0"))
        body = data[_FRAME.size :]
        cards: list[bytes] = []
        if flags & HAS_CARDS and len(body) >= _CARD_LENGTHS.size:
            body, lengths = body[: -_CARD_LENGTHS.size], _CARD_LENGTHS.unpack(body[-_CARD_LENGTHS.size :])
            for length_of_card in reversed(lengths):
                cut = max(0, len(body) - length_of_card)
                body, cards = body[:cut], [body[cut:], *cards]
        target = self._folder / "second" if flags & IN_SUBFOLDER else self._folder
        for path in self._folder.rglob("*.*"):
            path.unlink()
        if not flags & NO_CONFIG:
            (target / CONFIG_FILE).write_bytes(body[:length])
        if not flags & NO_WEIGHTS:
            (target / WEIGHTS_FILE).write_bytes(body[length:])
        for name, card in zip(_CARDS, cards, strict=False):
            if card:
                (self._folder / name).write_bytes(card)
        return len(body) + sum(map(len, cards))


def _peak_bytes() -> int:
    """The most memory that this process has ever had: what was taken and given back shows too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

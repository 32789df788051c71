"""What was understood of the latest layouts of files: a fleet that one recipe trained differs in its numbers only.

Matching, checking and planning hundreds of modules is half of a load, and Python, so that whoever needs the interpreter
waits. Files whose headers and configurations are equal byte by byte, and equally long, mean the same; only their
tensors are read anew. Not kept: what took a number from the tensors' data (an alpha), and headers of unusual size.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from lora_server.adapters.formats.header import Buffer, over_bytes
from lora_server.adapters.formats.inputs import SourceFile
from lora_server.adapters.formats.keys import Role
from lora_server.adapters.formats.layout import Layout

_MOST_LAYOUTS = 8
_MOST_DESCRIBING_BYTES = 512 * 1024
"""Of headers and configurations; parsed they take about ten times as much."""


class KnownLayouts:
    """The layouts that were met last, for one model and one set of rules. Thread-safe."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: bytes, adapter: str, contents: Mapping[str, Buffer]) -> Layout | None:
        """Returns the layout of *key*, its tensors being those of *adapter*'s *contents*; None if it is not known."""
        with self._lock:
            known = self._layouts.get(key)
            if known is None:
                return None
            self._layouts.move_to_end(key)
        return Layout([_of_adapter(file, adapter, contents) for file in known.files], known.plan)

    def keep(self, key: bytes, layout: Layout) -> None:
        """Notes a layout, without the bytes of its adapter, if it can be used again."""
        if any(Role.ALPHA in module.keys for module in layout.plan.modules):
            return
        nobodys = [replace(file, tensors=over_bytes(file.tensors, b"")) for file in layout.files]
        with self._lock:
            self._layouts[key] = Layout(nobodys, layout.plan)
            while len(self._layouts) > _MOST_LAYOUTS:
                self._layouts.popitem(last=False)


def layout_key(contents: Mapping[str, Buffer], *, allow_partial: bool) -> bytes | None:
    """Names all that a plan is made from, of files by relative path; None if that is more than is worth keeping."""
    digest, total = hashlib.sha256(bytes([allow_partial])), 0
    for path, data in sorted(contents.items()):
        describing = _describing(path, data)
        total += len(describing)
        if total > _MOST_DESCRIBING_BYTES:
            return None
        digest.update(struct.pack("<QQQ", len(path.encode()), len(data), len(describing)))
        digest.update(path.encode())
        digest.update(describing)
    return digest.digest()


def _describing(path: str, data: Buffer) -> memoryview:
    """The bytes of a file that are no tensors' data: its header, or all of it."""
    view = memoryview(data)
    if not path.endswith(".safetensors") or view.nbytes < 8:
        return view
    (length,) = struct.unpack("<Q", view[:8])
    return view[: min(8 + length, view.nbytes)]


def _of_adapter(file: SourceFile, adapter: str, contents: Mapping[str, Buffer]) -> SourceFile:
    config = None if file.config is None else replace(file.config, adapter=adapter)
    return replace(file, tensors=over_bytes(file.tensors, contents[file.tensors.name]), config=config)

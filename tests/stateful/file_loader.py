"""A loader of true files without torch: an adapter's weights are its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.settling import read_settled
from lora_server.adapters.source import CONFIG_FILE, AdapterFiles, AdapterFolder, Signature
from lora_server.errors import AdapterMalformedError
from lora_server.types import ComponentSummary, LoadReport


@dataclass(frozen=True)
class Bytes:
    """Weights of so many bytes."""

    size_bytes: int
    rank: int = 4
    components: tuple[ComponentSummary, ...] = (ComponentSummary("transformer", 1, 4, 4),)


class FileLoader:
    """Files that begin with `bad`, or are empty, are malformed; so is a configuration alone."""

    def __init__(self, roots: AdapterRoots) -> None:
        self._roots = roots

    def locate(self, path: str | Path) -> Path:
        return self._roots.locate(path)

    def signature(self, folder: Path) -> Signature:
        return self._folder(folder).signature()

    def files(self, folder: Path) -> AdapterFiles:
        return self._folder(folder).read(1 << 20)

    def load(self, folder: Path) -> LoadedAdapter:
        signature, files = read_settled(lambda: self.signature(folder), lambda: self.files(folder), folder.name)
        data = b"".join(files.contents.values())
        if data.startswith(b"bad") or not all(files.contents.values()) or set(files.contents) == {CONFIG_FILE}:
            raise AdapterMalformedError(folder.name, "is bad")
        weights = Bytes(len(data))
        report = LoadReport("peft", ("lora",), 4, 4, 4.0, 4.0, weights.components, len(data), files.digest)
        return LoadedAdapter(files.digest, weights, signature, report=report)

    load_partial = load

    def _folder(self, folder: Path) -> AdapterFolder:
        return AdapterFolder(folder, [], self._roots)

"""Where adapters may come from, which of their files count, and what makes two versions the same.

Owns the check of paths and the reading of files. Knows nothing of what the files say, and never opens anything that
is not a regular file under an allowed root.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_server.errors import AdapterMalformedError, AdapterSourceForbiddenError, AdapterSourceNotFoundError
from lora_server.types import Digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_MAX_CONFIG_BYTES = 384 * 1024  # parsed, hostile JSON takes forty times as much

Signature = tuple[tuple[str, int, int, int], ...]
"""(relative path, size, mtime in ns, inode) of every file that counts: changes when a file does, costs a stat each."""


class AdapterRoots:
    """The directories under which adapters may lie."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(root.resolve() for root in roots)

    def locate(self, path: str) -> Path:
        """Returns the folder that *path* means, with symbolic links resolved; a relative path is tried in each root.

        What lies outside the roots is forbidden whether it exists or not, so that nobody can look around.

        Raises:
            AdapterSourceForbiddenError: If it leads out of every root, or has `..` or a NUL in it.
            AdapterSourceNotFoundError: If there is no such folder.
        """
        if "\0" in path or not path or ".." in Path(path).parts:
            raise AdapterSourceForbiddenError(path)
        candidates = [Path(path)] if os.path.isabs(path) else [root / path for root in self._roots]
        resolved = [folder for candidate in candidates if (folder := self._inside(candidate)) is not None]
        if not resolved:
            raise AdapterSourceForbiddenError(path)
        for folder in resolved:
            if folder.is_dir():
                return folder
            if folder.exists():
                raise AdapterMalformedError(path, "is not a folder in PEFT format", key=folder.name)
        raise AdapterSourceNotFoundError(path)

    def contains(self, path: Path) -> bool:
        """Whether *path*, with links resolved, lies under a root."""
        return self._inside(path) is not None

    def _inside(self, path: Path) -> Path | None:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
            return None
        return resolved if any(resolved.is_relative_to(root) for root in self._roots) else None


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The bytes of one version, exactly those that the digest is of.

    Attributes:
        digest: SHA-256 over the manifest.
        contents: By path relative to the folder, such as `text_encoder/adapter_config.json`.
    """

    digest: Digest
    contents: Mapping[str, bytes]


class AdapterFolder:
    """Reads one adapter's folder: its own PEFT files, and those of sub-folders named after components."""

    def __init__(self, folder: Path, components: Sequence[str], roots: AdapterRoots) -> None:
        self._folder = folder
        self._components = components
        self._roots = roots

    def signature(self) -> Signature:
        """Returns what changes when a file does.

        Raises:
            AdapterSourceNotFoundError: If there is no adapter in the folder.
        """
        entries = []
        for name in self._names():
            try:
                status = os.stat(self._folder / name)
            except OSError as error:  # it has vanished since it was listed
                raise AdapterSourceNotFoundError(name, error.strerror or "cannot be read") from error
            entries.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
        return tuple(entries)

    def read(self, max_file_bytes: int) -> AdapterFiles:
        """Reads every file that counts, once; the digest is of the very bytes returned.

        Raises:
            AdapterSourceNotFoundError: If there is no adapter in the folder, or a file vanishes.
            AdapterSourceForbiddenError: If a file is a link that leads out of the roots.
            AdapterMalformedError: If a file is not regular, or larger than it may be.
        """
        contents = {name: self._read_file(name, max_file_bytes) for name in self._names()}
        manifest = hashlib.sha256()
        for name, data in sorted(contents.items()):
            manifest.update(f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        return AdapterFiles(f"sha256:{manifest.hexdigest()}", contents)

    def _names(self) -> list[str]:
        """The files that count, sorted; a folder with a configuration or weights is meant as an adapter."""
        prefixes = ["", *(f"{component}/" for component in self._components)]
        names = sorted(
            prefix + file for prefix in prefixes for file in (CONFIG_FILE, WEIGHTS_FILE) if self._is_file(prefix + file)
        )
        if not names:
            if (self._folder / _PICKLE_FILE).exists():
                raise AdapterMalformedError(
                    self._folder.name,
                    "is a pickle, which this server never opens; save it as safetensors",
                    _PICKLE_FILE,
                )
            raise AdapterSourceNotFoundError(self._folder.name, f"the folder has no {CONFIG_FILE}")
        return names

    def _is_file(self, name: str) -> bool:
        try:
            return (self._folder / name).is_file()
        except OSError as error:
            raise AdapterSourceNotFoundError(name, error.strerror or "cannot be read") from error

    def _read_file(self, name: str, max_file_bytes: int) -> bytes:
        path = self._folder / name
        if not self._roots.contains(path):
            raise AdapterSourceForbiddenError(name)
        limit = _MAX_CONFIG_BYTES if name.endswith(CONFIG_FILE) else max_file_bytes
        try:
            # Non-blocking, so that a FIFO put in the file's place cannot hang a loader.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterSourceNotFoundError(name, error.strerror or "cannot be opened") from error
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterMalformedError(self._folder.name, "is not a regular file", name)
            if status.st_size > limit:
                raise AdapterMalformedError(
                    self._folder.name, f"has {status.st_size} bytes, more than the {limit} allowed", name
                )
            return file.read(status.st_size)  # not up to the limit: read() takes that much memory first

"""Where adapters may come from, which of their files count, and what makes two versions the same.

| given | files that count | digest |
|---|---|---|
| a folder with PEFT's files | those, and those of sub-folders named after components | of the manifest |
| another folder | pytorch_lora_weights.safetensors, else its only *.safetensors | of the manifest |
| a .safetensors file | itself | the file's sha256sum |

Owns the check of paths and the reading of files. Knows nothing of what the files say, and never opens anything that
is not a regular file under an allowed root.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lora_server.adapters.embedding_names import adapters_among
from lora_server.errors import (
    AdapterError,
    AdapterFileTooLargeError,
    AdapterMalformedError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
)
from lora_server.types import Digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"
SETTINGS_FILE = "lora_inference.json"
UPLOAD_SCHEME = "upload://"
"""Begins the path of a source that lies in the server's own store; a digest follows."""
HUB_SCHEME = "hub://"
"""Begins the path of a source on the Hugging Face hub; see `adapters.hub`."""
_SUFFIX = ".safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE = "is a pickle, which this server never opens; save it as safetensors"
_MAX_CONFIG_BYTES = 384 * 1024  # parsed, hostile JSON takes forty times as much
_MAX_CARD_BYTES = 256 * 1024  # parsed as well, one after the other
_LARGE_BYTES = 4 * 1024 * 1024

FileBytes = bytes | bytearray | mmap.mmap
"""A file's bytes in memory."""
Signature = tuple[tuple[str, int, int, int], ...]
"""(relative path, size, mtime in ns, inode) of every file that counts: changes when a file does, costs a stat each."""


class NoAdapterFileError(AdapterMalformedError):
    """Something lies at *place*, and is neither a folder nor a .safetensors file."""

    def __init__(self, path: str, detail: str, place: Path) -> None:
        super().__init__(path, detail, key=place.name)
        self.place = place


class AdapterRoots:
    """The directories under which adapters may lie, and other places that sources may name.

    A path that begins with one of *schemes* is what the function of that scheme makes of the rest; it must lie in the
    roots or in *own*, the server's own folders, into which no path of a client leads.
    """

    def __init__(
        self,
        roots: Iterable[Path],
        schemes: Mapping[str, Callable[[str], Path]] | None = None,
        own: Iterable[Path] = (),
    ) -> None:
        self._own = tuple(folder.resolve() for folder in own)
        self._roots = tuple(root.resolve() for root in roots)
        self._schemes = dict(schemes or {})

    def locate(self, path: str | Path) -> Path:
        """Returns the folder or file that *path* means, links resolved; a relative path is tried in each root.

        What lies outside the roots is forbidden whether it exists or not, so that nobody can look around. A text is
        what a client says; a Path, where the server itself has found something before.

        Raises:
            AdapterSourceForbiddenError: If it leads out of every root, or has `..` or a NUL in it.
            AdapterSourceNotFoundError: If there is no such folder or file.
            AdapterMalformedError: If it is a file, but not a .safetensors file.
        """
        if isinstance(path, Path):
            return self._first_of([path], str(path), allow_own=True)
        if "\0" in path or not path or ".." in Path(path).parts:
            raise AdapterSourceForbiddenError(path)
        for scheme, place_of in self._schemes.items():
            if path.startswith(scheme):
                return self._first_of([place_of(path.removeprefix(scheme))], path, allow_own=True)
        candidates = [Path(path)] if os.path.isabs(path) else [root / path for root in self._roots]
        return self._first_of(candidates, path, allow_own=False)

    def _first_of(self, candidates: Iterable[Path], path: str, *, allow_own: bool) -> Path:
        inside = (self._inside(candidate) for candidate in candidates)
        resolved = [place for place in inside if place is not None and (allow_own or not self._is_own(place))]
        if not resolved:
            raise AdapterSourceForbiddenError(path)
        for place in resolved:
            if place.is_dir() or (place.is_file() and place.name.endswith(_SUFFIX)):
                return place
            if place.exists():
                pickled = place.name.endswith(_PICKLE_SUFFIXES)
                detail = _PICKLE if pickled else f"is neither a folder nor a {_SUFFIX} file"
                raise NoAdapterFileError(path, detail, place)
        raise AdapterSourceNotFoundError(path)

    def contains(self, path: Path) -> bool:
        """Whether *path*, with links resolved, lies under a root."""
        return self._inside(path) is not None

    def _inside(self, path: Path) -> Path | None:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
            return None
        return resolved if any(resolved.is_relative_to(root) for root in (*self._roots, *self._own)) else None

    def _is_own(self, place: Path) -> bool:
        return any(place.is_relative_to(folder) for folder in self._own)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The bytes of one version, exactly those that the digest is of.

    Attributes:
        digest: SHA-256 over the manifest, or of a bare file.
        contents: By path relative to the folder, such as `text_encoder/adapter_config.json`.
        cards: Files beside them that only describe them, of which nothing depends but the report.
    """

    digest: Digest
    contents: Mapping[str, FileBytes]
    cards: Mapping[str, bytes] = field(default_factory=dict)


class AdapterFolder:
    """Reads the files of one adapter: a folder's, or a bare file."""

    def __init__(self, place: Path, components: Sequence[str], roots: AdapterRoots) -> None:
        """*place* is a folder or a file, links resolved; *components* may have sub-folders of their own."""
        self._bare = place.name if place.is_file() else None
        self._folder = place.parent if self._bare else place
        self._name = place.name
        self._components = components
        self._roots = roots

    def signature(self) -> Signature:
        """Returns what changes when a file does.

        Raises:
            AdapterSourceNotFoundError: If there is no adapter in the folder.
        """
        return self.signature_of(self._names())

    def signature_of(self, names: Iterable[str]) -> Signature:
        """The same of those of *names* that there are."""
        entries = []
        for name in names:
            if not self._is_file(name):
                continue
            try:
                status = os.stat(self._folder / name)
            except OSError as error:  # it has vanished since it was listed
                raise AdapterSourceNotFoundError(name, error.strerror or "cannot be read") from error
            entries.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
        return tuple(entries)

    def read_optional(self, names: Iterable[str], max_file_bytes: int) -> dict[str, bytes]:
        """Reads those of *names* that there are; they are no part of the digest.

        A file that is a link out of the roots, that cannot be opened or is too large is as good as none.
        """
        found = {}
        for name in names:
            if (self._folder / name).is_file():
                with contextlib.suppress(AdapterError):
                    found[name] = bytes(self._read_file(name, max_file_bytes))
        return found

    def read(self, max_file_bytes: int) -> AdapterFiles:
        """Reads every file that counts, once; the digest is of the very bytes returned. Raises as `contents`."""
        contents = self.contents(max_file_bytes)
        return AdapterFiles(self.digest_of(contents), contents, self.cards())

    def contents(self, max_file_bytes: int) -> Mapping[str, FileBytes]:
        """Reads every file that counts, by relative path.

        Raises:
            AdapterSourceNotFoundError: If there is no adapter in the folder, or a file vanishes.
            AdapterSourceForbiddenError: If a file is a link that leads out of the roots.
            AdapterMalformedError: If a file is not regular.
            AdapterFileTooLargeError: If one is larger than it may be.
        """
        return {name: self._read_file(name, max_file_bytes) for name in self._names()}

    def paths(self) -> Mapping[str, Path]:
        """The files that count, by relative path; nothing is read."""
        return {name: self._folder / name for name in self._names()}

    def cards(self) -> Mapping[str, bytes]:
        """What describes the adapter beside its files, by name; passes over the unreadable and those over 256 KiB."""
        return self.read_optional(self.card_names(), _MAX_CARD_BYTES)

    def card_names(self) -> list[str]:
        """The files that may describe it: this server's own lora_inference.json, A1111's NAME.json, README.md."""
        weights = self._weights_in_folder()
        names = [f"{Path(self._bare or name).stem}.json" for name in weights if self._bare in (None, name)]
        if len(weights) == 1 or (self._folder / CONFIG_FILE).is_file():
            names += [SETTINGS_FILE, CARD_FILE]  # beside several adapters, nobody knows whose they are
        return names

    def digest_of(self, contents: Mapping[str, FileBytes]) -> Digest:
        """The version that these *contents* are."""
        if self._bare is not None:
            return f"sha256:{hashlib.sha256(contents[self._bare]).hexdigest()}"
        return manifest_digest({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()})

    def _weights_in_folder(self) -> list[str]:
        with os.scandir(self._folder) as entries:
            return adapters_among(
                sorted(each.name for each in entries if each.name.endswith(_SUFFIX) and each.is_file())
            )

    def _names(self) -> list[str]:
        """The files that count, sorted; a folder with a configuration or weights is meant as an adapter."""
        if self._bare is not None:
            return [self._bare]
        prefixes = ["", *(f"{component}/" for component in self._components)]
        names = sorted(
            prefix + file for prefix in prefixes for file in (CONFIG_FILE, WEIGHTS_FILE) if self._is_file(prefix + file)
        )
        return names or [self._only_weights()]

    def _only_weights(self) -> str:
        if (self._folder / DIFFUSERS_FILE).is_file():
            return DIFFUSERS_FILE
        try:
            weights = self._weights_in_folder()
            pickles = [name for name in sorted(os.listdir(self._folder)) if name.endswith(_PICKLE_SUFFIXES)]
        except OSError as error:
            raise AdapterSourceNotFoundError(self._name, error.strerror or "cannot be read") from error
        if len(weights) == 1:
            return weights[0]
        if weights:
            detail = f"has {len(weights)} {_SUFFIX} files; name one of them, such as {weights[0]}"
            raise AdapterMalformedError(self._name, detail, weights[1])
        if pickles:
            raise AdapterMalformedError(self._name, _PICKLE, pickles[0])
        raise AdapterSourceNotFoundError(self._name, f"the folder has no {CONFIG_FILE} and no {_SUFFIX} file")

    def _is_file(self, name: str) -> bool:
        try:
            return (self._folder / name).is_file()
        except OSError as error:
            raise AdapterSourceNotFoundError(name, error.strerror or "cannot be read") from error

    def _read_file(self, name: str, max_file_bytes: int) -> FileBytes:
        """A file's bytes, writable, so that tensors can be views of them."""
        path = self._folder / name
        if not self._roots.contains(path):
            raise AdapterSourceForbiddenError(name)
        limit = most_bytes(name, max_file_bytes)
        try:
            # Non-blocking, so that a FIFO put in the file's place cannot hang a loader.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterSourceNotFoundError(name, error.strerror or "cannot be opened") from error
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterMalformedError(self._name, "is not a regular file", name)
            if status.st_size > limit:
                raise AdapterFileTooLargeError(self._name, name, status.st_size, limit)
            return _read(file, status.st_size)  # not up to the limit, which would take that much memory first


def most_bytes(name: str, max_file_bytes: int) -> int:
    """How large a file of an adapter may be, if its weights may be as large as *max_file_bytes*."""
    return _MAX_CONFIG_BYTES if name.endswith(CONFIG_FILE) else max_file_bytes


def _read(file: BinaryIO, size_bytes: int) -> FileBytes:
    """Reads a file of that size, or what is left of it, into writable memory.

    A large one into pages of its own, huge ones where the system has them: three times as fast as `read`, and given
    back to the system at once.
    """
    if size_bytes < _LARGE_BYTES:
        return bytearray(file.read(size_bytes))
    data = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        data.madvise(mmap.MADV_HUGEPAGE)
    count = file.readinto(data)  # type: ignore[attr-defined]  # BinaryIO lacks it
    return data if count == size_bytes else bytearray(data[:count])


def manifest_digest(files: Mapping[str, tuple[int, str]]) -> Digest:
    """The digest of a folder's files: by relative path, their size and the hex digits of their SHA-256."""
    manifest = hashlib.sha256()
    for name, (size_bytes, sha256) in sorted(files.items()):
        manifest.update(f"{name}\0{size_bytes}\0{sha256}\n".encode())
    return f"sha256:{manifest.hexdigest()}"

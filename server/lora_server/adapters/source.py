"""Where adapters may come from, which of their files count, and what makes two versions the same.

| given | files that count | digest |
|---|---|---|
| a folder with PEFT's files | those, and those of sub-folders named after components | of the manifest |
| another folder | pytorch_lora_weights.safetensors, else its only *.safetensors | of the manifest |
| a .safetensors file | itself | the file's sha256sum |

Owns the reading of files. Knows nothing of what the files say, and never opens anything that is not a regular file
under an allowed root (`roots`). What a user cannot have meant as weights does not count (`selection`).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lora_server.adapters.embedding_names import adapters_among
from lora_server.adapters.roots import PICKLE, AdapterRoots
from lora_server.adapters.selection import SUFFIX, is_pickle, is_weights
from lora_server.errors import (
    AdapterError,
    AdapterFileTooLargeError,
    AdapterMalformedError,
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
_MAX_CONFIG_BYTES = 384 * 1024  # parsed, hostile JSON takes forty times as much
_MAX_CARD_BYTES = 256 * 1024  # parsed as well, one after the other
_LARGE_BYTES = 4 * 1024 * 1024

FileBytes = bytes | bytearray | mmap.mmap
"""A file's bytes in memory."""
Signature = tuple[tuple[str | int, ...], ...]
"""(relative path, size, mtime in ns, ctime in ns, inode, device) of every file that counts: changes when a file does,
or what a link to it means. Costs a stat each. Nobody can set a ctime, so that an overwrite that keeps size and mtime is
noticed."""
CTIME = 3
"""Where in an entry of a signature the ctime stands."""


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
    """Reads the files of one adapter: a folder's, or a bare file. What the disk refuses is an AdapterError."""

    def __init__(self, place: Path, components: Sequence[str], roots: AdapterRoots) -> None:
        """*place* is a folder or a file as `AdapterRoots.locate` gives it; *components* may have sub-folders."""
        self._bare = place.name if os.path.isfile(place) else None
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
            with self._told(name):  # it may have vanished since it was listed
                of = os.stat(self._folder / name)
            entries.append((name, of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino, of.st_dev))
        return tuple(entries)

    def read_optional(self, names: Iterable[str], max_file_bytes: int) -> dict[str, bytes]:
        """Reads those of *names* that there are; they are no part of the digest.

        A file that is a link out of the roots, that cannot be opened or is too large is as good as none.
        """
        found = {}
        for name in names:
            if self._is_file(name):
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
        """The files that may describe it: this server's own lora_inference.json, A1111's NAME.json, README.md.

        Raises:
            AdapterSourceNotFoundError: If the folder cannot be listed.
        """
        weights = self._weights()
        names = [f"{Path(self._bare or name).stem}.json" for name in weights if self._bare in (None, name)]
        if len(weights) == 1 or self._is_file(CONFIG_FILE):
            names += [SETTINGS_FILE, CARD_FILE]  # beside several adapters, nobody knows whose they are
        return names

    def digest_of(self, contents: Mapping[str, FileBytes]) -> Digest:
        """The version that these *contents* are."""
        if self._bare is not None:
            return f"sha256:{hashlib.sha256(contents[self._bare]).hexdigest()}"
        return manifest_digest({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()})

    def _weights(self) -> list[str]:
        """The files directly in the folder that may be an adapter's weights, sorted."""
        return adapters_among(self._listed(is_weights))

    def _listed(self, counts: Callable[[str], bool]) -> list[str]:
        """The files directly in the folder whose names count, sorted."""
        with self._told(self._name), os.scandir(self._folder) as entries:
            return sorted(entry.name for entry in entries if counts(entry.name) and entry.is_file())

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
        if self._is_file(DIFFUSERS_FILE):
            return DIFFUSERS_FILE
        weights, pickles = self._weights(), self._listed(is_pickle)
        if len(weights) == 1:
            return weights[0]
        if weights:
            detail = f"has {len(weights)} {SUFFIX} files; name one of them, such as {weights[0]}"
            raise AdapterMalformedError(self._name, detail, weights[1])
        if pickles:
            raise AdapterMalformedError(self._name, PICKLE, pickles[0])
        raise AdapterSourceNotFoundError(self._name, f"the folder has no {CONFIG_FILE} and no {SUFFIX} file")

    def _is_file(self, name: str) -> bool:
        return os.path.isfile(self._folder / name)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """What the disk says of a file or folder, as a domain error."""
        try:
            yield
        except OSError as error:
            raise AdapterSourceNotFoundError(name, error.strerror or "cannot be read") from error

    def _read_file(self, name: str, max_file_bytes: int) -> FileBytes:
        """A file's bytes, writable, so that tensors can be views of them."""
        limit = most_bytes(name, max_file_bytes)
        with self._told(name), open(self._roots.open(self._folder / name), "rb") as file:
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
        manifest.update(f"{name}\0{size_bytes}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return f"sha256:{manifest.hexdigest()}"

"""The directories under which adapters may lie: what a path means, and opening files without being led out of them.

Links are followed as long as they lead to what is allowed: into a root, or from a snapshot of a hub's cache to the
blobs of the same repository. A file is opened through directories that are none of them links, along the path that was
checked, so that nobody can put a link into the way between the check and the opening.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from lora_server.adapters.selection import PICKLE_SUFFIXES, SUFFIX
from lora_server.errors import AdapterMalformedError, AdapterSourceForbiddenError, AdapterSourceNotFoundError

PICKLE = "is a pickle, which this server never opens; save it as safetensors"
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Non-blocking, so that a FIFO put in the file's place cannot hang a loader.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_SWITCHED = (errno.ELOOP, errno.ENOTDIR)
"""What opening says of a link in a path that had none when it was resolved."""
_TRIES = 4


class NoAdapterFileError(AdapterMalformedError):
    """Something lies at *place*, and is neither a folder nor a .safetensors file."""

    def __init__(self, path: str, place: Path) -> None:
        detail = PICKLE if place.name.endswith(PICKLE_SUFFIXES) else f"is neither a folder nor a {SUFFIX} file"
        super().__init__(path, detail, key=place.name)
        self.place = place


class AdapterRoots:
    """The directories under which adapters may lie, and other places that sources may name.

    A path that begins with one of *schemes* is what the function of that scheme makes of the rest; it must lie in the
    roots or in *own*, the server's own folders, into which no path of a client leads. A root may be a link that is
    switched while the server runs. Thread-safe.
    """

    def __init__(
        self,
        roots: Iterable[Path],
        schemes: Mapping[str, Callable[[str], Path]] | None = None,
        own: Iterable[Path] = (),
    ) -> None:
        self._own = frozenset(folder.resolve() for folder in own)
        self._given = tuple(root.absolute() for root in roots)
        self._schemes = dict(schemes or {})
        self._roots, self._blobs = self._resolved()

    def locate(self, path: str | Path) -> Path:
        """Returns the folder or file that *path* means, links resolved; a relative path is tried in each root.

        A link that is named as a weights file is to a file of another name stays itself. What lies outside the roots
        is forbidden whether it exists or not, so that nobody can look around. A text is what a client says; a Path,
        where the server itself has found something before.

        Raises:
            AdapterSourceForbiddenError: If it leads out of every root, or has `..` or a NUL in it.
            AdapterSourceNotFoundError: If there is no such folder or file.
            NoAdapterFileError: If it is a file, but not a .safetensors file.
        """
        if isinstance(path, Path):
            return self._first_of([path], str(path), allow_own=True)
        if "\0" in path or not path or ".." in Path(path).parts:
            raise AdapterSourceForbiddenError(path)
        for scheme, place_of in self._schemes.items():
            if path.startswith(scheme):
                return self._first_of([place_of(path.removeprefix(scheme))], path, allow_own=True)
        candidates = [Path(path)] if os.path.isabs(path) else [root / path for root in self._given]
        return self._first_of(candidates, path, allow_own=False)

    def _first_of(self, candidates: Iterable[Path], path: str, *, allow_own: bool) -> Path:
        found = (self._place(candidate, allow_own=allow_own) for candidate in candidates)
        places = [place for place in found if place is not None]
        if not places:
            raise AdapterSourceForbiddenError(path)
        for place in places:
            if os.path.isdir(place) or (os.path.isfile(place) and place.name.endswith(SUFFIX)):
                return place
            if os.path.lexists(place):
                raise NoAdapterFileError(path, place)
        raise AdapterSourceNotFoundError(path)

    def open(self, path: Path) -> int:
        """Opens a file, wherever its links lead within what is allowed; returns a descriptor for reading.

        Raises:
            AdapterSourceForbiddenError: If they lead out of it, or are switched again and again.
            OSError: If it cannot be opened.
        """
        for _ in range(_TRIES):
            real = _resolve(path)
            if real is None or not self._may_read(real):
                break
            try:
                return _open_without_links(real)
            except OSError as error:
                if error.errno not in _SWITCHED:
                    raise
        raise AdapterSourceForbiddenError(path.name)

    def _place(self, path: Path, *, allow_own: bool) -> Path | None:
        """What a path means; None if that is not allowed."""
        real = self._allowed(path, allow_own=allow_own)
        if real is None or not path.name.endswith(SUFFIX) or real.name.endswith(SUFFIX) or not os.path.isfile(real):
            return real
        parent = _resolve(path.parent)
        if parent is None:
            return None
        link = parent / path.name
        is_inside = link in self._given_links() or self._allowed(parent, allow_own=allow_own) is not None
        return link if is_inside else None

    def _given_links(self) -> Iterator[Path]:
        """The roots themselves; one may be a link to a file."""
        return (parent / root.name for root in self._given if (parent := _resolve(root.parent)) is not None)

    def _allowed(self, path: Path, *, allow_own: bool) -> Path | None:
        real = _resolve(path)
        if real is None or not self._may_read(real) or (self._is_own(real) and not allow_own):
            return None
        return real

    def _is_own(self, real: Path) -> bool:
        return not self._own.isdisjoint((real, *real.parents))

    def _may_read(self, real: Path) -> bool:
        if self._covers(real):
            return True
        self._roots, self._blobs = self._resolved()  # a root may be a link, and have been switched
        return self._covers(real)

    def _covers(self, real: Path) -> bool:
        return not (self._roots | self._own).isdisjoint((real, *real.parents)) or real.parent in self._blobs

    def _resolved(self) -> tuple[frozenset[Path], frozenset[Path]]:
        """The roots as they are now, and the folders of blobs that snapshots among them link to."""
        roots = frozenset(root for given in self._given if (root := _resolve(given)) is not None)
        return roots, frozenset(blobs for root in {*roots, *self._given} for blobs in _blobs_of(root))


def _blobs_of(root: Path) -> Iterator[Path]:
    """The blobs of the repository in a hub's cache, if *root* is one of its snapshots or lies in one."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and (blobs := place.parent.parent / "blobs").is_dir():
            yield blobs.resolve()


def _resolve(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
        return None


def _open_without_links(real: Path) -> int:
    """Opens a resolved path from directory to directory; OSError with ELOOP or ENOTDIR if one is a link by now."""
    directory = os.open(real.anchor, _DIRECTORY)
    try:
        for part in real.parts[1:-1]:
            inner = os.open(part, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
        return os.open(real.name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)

"""Where the files of an adapter are, whatever the way that leads there: what a binding to tenants is of.

Two places *touch* if they have a file in common, or one holds the other: by their paths with links resolved, by the
files' inodes (another mount of a folder, a hard link of a file), or as parts of one repository of the hub.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_server.adapters.source import HUB_SCHEME, Signature

Mark = Path | tuple[int, int] | str
"""What files are known by: a resolved path, a device and inode, or a repository."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter's files are.

    Attributes:
        group: What bindings of one place have in common: the path, or the repository.
        itself: The marks of the place, and of its files that lie elsewhere.
        above: The marks of all folders that hold those.
        seen: Whether the inodes are among the marks.
    """

    group: Mark
    itself: frozenset[Mark]
    above: frozenset[Mark]
    seen: bool = False

    def __or__(self, other: Place) -> Place:
        """Both places as one, in the group of the first."""
        itself, above = self.itself | other.itself, self.above | other.above
        return Place(self.group, itself, above, self.seen and other.seen)

    def covers(self, path: Path, signature: Signature) -> bool:
        """Whether *path*, links followed, and its files that *signature* names are of this place by their inodes."""
        return self.itself.issuperset(_inodes([path, *_files(path, signature)]))


def place_by_name(source_path: str, folder: Path) -> Place:
    """Returns what is known of a place without a look at its files; *folder* is as `AdapterRoots.locate` gives it."""
    repository = repository_of(source_path)
    own: set[Mark] = {folder, HUB_SCHEME + repository} if repository else {folder}
    return Place(HUB_SCHEME + repository if repository else folder, frozenset(own), frozenset(folder.parents))


def place_on_disk(source_path: str, folder: Path, signature: Signature) -> Place:
    """Returns the same with the inodes; blocks for some stats. *signature* names the files that count."""
    named = place_by_name(source_path, folder)
    files = [Path(os.path.realpath(file)) for file in _files(folder, signature)]
    elsewhere = {file for file in files if not file.is_relative_to(folder if folder.is_dir() else folder.parent)}
    parents = named.above.union(*(file.parents for file in elsewhere))
    return Place(
        named.group,
        named.itself | elsewhere | set(_inodes([folder, *files])),
        parents | set(_inodes(path for path in parents if isinstance(path, Path))),
        seen=True,
    )


def seen_again(place: Place, signature: Signature) -> Place:
    """Returns a place with the inodes that its paths have now: those of removed files may be others' files by now."""
    itself, above = ([mark for mark in marks if isinstance(mark, Path)] for marks in (place.itself, place.above))
    files = [file for path in itself if path.is_dir() for file in _files(path, signature)]
    return Place(
        place.group,
        _named(place.itself) | set(_inodes([*itself, *files])),
        _named(place.above) | set(_inodes(above)),
        seen=True,
    )


def _named(marks: frozenset[Mark]) -> frozenset[Mark]:
    return frozenset(mark for mark in marks if not isinstance(mark, tuple))


def repository_of(source_path: str) -> str:
    """Returns OWNER/NAME of a source of the hub, which does not tell upper from lower case; else an empty string."""
    if not source_path.startswith(HUB_SCHEME):
        return ""
    owner, _, rest = source_path.removeprefix(HUB_SCHEME).partition("/")
    return f"{owner}/{rest.partition('@')[0].partition('/')[0]}".casefold()


def _files(folder: Path, signature: Signature) -> list[Path]:
    base = folder if folder.is_dir() else folder.parent
    return [base / str(name) for name, *_ in signature]


def _inodes(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            yield status.st_dev, status.st_ino

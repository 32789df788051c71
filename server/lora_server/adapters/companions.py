"""What lies beside an adapter's files and belongs to it, though it is not read: told by names alone.

| beside | what becomes of it |
|---|---|
| what new words mean (pivotal tuning): `*_emb.safetensors`, `*.pti`, `learned_embeds*` | refused, or left out |
| a sub-folder for a component that the model has not, weights beside those of sub-folders | refused, or left out |
| shards without the whole file, a pickle in its place | refused |
| other weights beside those that are read | a warning |

What is left out, because the load allows it, is in the report. Pure functions of names, so that a folder on the disk,
an upload and a repository on the hub are treated alike.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_server.adapters.embedding_names import is_embeddings, is_embeddings_folder
from lora_server.adapters.selection import is_weights
from lora_server.adapters.source import CONFIG_FILE, DIFFUSERS_FILE, WEIGHTS_FILE, AdapterFolder
from lora_server.errors import AdapterMalformedError

_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)|.*\.(safetensors|bin)\.index\.json", re.I)
_COMPONENT = re.compile(r"transformer(_\d+)?|unet|prior|text_encoder(_\d+)?")
_PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILE.replace(".safetensors", ".bin"), DIFFUSERS_FILE)
_MAX_LISTED = 4096
_LISTING = ".beside.json"
"""In downloads, of which only what counts is fetched: what else there is."""


@dataclass(frozen=True, slots=True)
class Companions:
    """What lies beside an adapter's files.

    Attributes:
        embeddings: Of new words; files, or a folder of them.
        unreadable: What holds the adapter's weights in a form that is not read, and how to change that.
        unread: Other weights that would have to be applied as well.
        others: Weights that are passed over.
    """

    embeddings: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def check(self, adapter: str, *, allow_partial: bool) -> list[str]:
        """Returns what is left out, a sentence each.

        Raises:
            AdapterMalformedError: If something cannot be read, or is left out and *allow_partial* is off.
        """
        for name, detail in self.unreadable:
            raise AdapterMalformedError(adapter, detail, name)
        left = [(name, "holds embeddings of new words, which are not applied") for name in self.embeddings]
        left += [(name, "belongs to the adapter and is for no component that is read") for name in self.unread]
        if left and not allow_partial:
            name, detail = left[0]
            raise AdapterMalformedError(adapter, f"{detail}; allow_partial draws without it", name)
        return [f"{name} {detail}" for name, detail in left] + [f"{name} is not read" for name in self.others]


NOTHING = Companions()


def stem_of(name: str) -> str:
    """A file's name without its folder and suffix."""
    return PurePosixPath(name).stem


def beside(place: Path, counted: Collection[str]) -> Companions:
    """Looks around the adapter at *place*, a folder or a bare file, of which *counted* is read, by relative path."""
    if os.path.isfile(place):
        return of_file(place.name, _names(place.parent))
    return of_folder(_names(place, {name.rpartition("/")[0] for name in counted}), counted)


def look_around(place: Path, folder: AdapterFolder, *, allow_partial: bool) -> Companions:
    """Returns what lies beside the adapter at *place*, whose files *folder* reads.

    Raises:
        AdapterSourceNotFoundError: If there is no adapter.
        AdapterMalformedError: If there is no single one, or as of `Companions.check`.
    """
    try:
        counted = folder.paths()
    except AdapterMalformedError:
        beside(place, ()).check(place.name, allow_partial=True)  # shards are several files, too
        raise
    found = beside(place, counted)
    found.check(place.name, allow_partial=allow_partial)
    return found


def of_file(name: str, siblings: Collection[str]) -> Companions:
    """What belongs to the bare file *name* among its *siblings*; beside several adapters, what is named after it."""
    if _SHARD.fullmatch(name):
        return Companions(unreadable=((name, _SHARDS),))
    tops = {each for each in siblings if each != name and "/" not in each}
    embeddings = sorted(each for each in tops if is_embeddings(each))
    stem = stem_of(name)
    alone = not any(is_weights(each) and each not in embeddings for each in tops)
    return Companions(embeddings=tuple(each for each in embeddings if alone or each.startswith(stem)))


def of_folder(names: Iterable[str], counted: Collection[str]) -> Companions:
    """What belongs to a folder of these *names*, files and folders by relative path, of which *counted* is read."""
    names, counted = frozenset(names), frozenset(counted)
    embeddings: list[str] = []
    unread: list[str] = []
    others: list[str] = []
    folders = {each.rpartition("/")[0] for each in counted}
    for name in sorted(names - counted):
        folder, _, file = name.rpartition("/")
        if is_embeddings(file) and folder in folders | {""}:
            embeddings.append(name)
        elif _COMPONENT.fullmatch(folder) and folder not in folders and file in _PEFT_FILES:
            unread.append(name)
        elif not folder and is_weights(file):
            (others if "" in folders else unread).append(name)
    return Companions(tuple(embeddings), _unreadable(names, counted), tuple(unread), tuple(others))


def with_folders(files: Iterable[str]) -> list[str]:
    """*files*, by relative path, and the folders that they lie in."""
    listed = list(files)
    return listed + sorted({parent for file in listed if (parent := file.rpartition("/")[0])})


def note_listing(folder: Path, file: str | None, names: Iterable[str]) -> None:
    """Notes in a download of *file*, or of the whole, which *names* lie beside it where it came from."""
    inside = f"{file.rpartition('/')[0]}/".removeprefix("/") if file is not None else ""
    beside_it = [name.removeprefix(inside) for name in with_folders(names) if name.startswith(inside)]
    (folder / inside / _LISTING).write_bytes(_listing(beside_it))


def listing_of(place: Path) -> dict[str, bytes]:
    """The file that a copy of the folder *place* needs, so that what lies beside its files is still known."""
    return {} if os.path.isfile(place) else {_LISTING: _listing(_names(place))}


def _listing(names: Iterable[str]) -> bytes:
    return json.dumps(sorted(names)[:_MAX_LISTED]).encode()


def _noted(folder: Path) -> list[str]:
    try:
        listed = json.loads((folder / _LISTING).read_bytes()) if (folder / _LISTING).is_file() else []
    except (OSError, ValueError):
        return []
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def is_component(folder: str) -> bool:
    """Whether a sub-folder of this name may be for a component of a pipeline."""
    return _COMPONENT.fullmatch(folder) is not None


_SHARDS = "is one of several shards, which are not joined here; save the adapter in one file"
_PICKLE = "is a pickle, which this server never opens; save it as safetensors"


def _unreadable(names: frozenset[str], counted: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """Shards, or a pickle, where the weights should be."""
    found: list[tuple[str, str]] = []
    for name in sorted(names):
        folder, slash, file = name.rpartition("/")
        whole = any(each.startswith(folder + slash) and each.endswith(".safetensors") for each in counted - {name})
        if folder and f"{folder}/{CONFIG_FILE}" not in counted:
            continue
        if _SHARD.fullmatch(file) and (not whole or name in counted):
            found.append((name, _SHARDS))
        elif file == "adapter_model.bin" and folder + slash + CONFIG_FILE in counted and not whole:
            found.append((name, _PICKLE))
    return tuple(found)


def _names(folder: Path, inner: Collection[str] = ()) -> list[str]:
    """Files in *folder*, in its folders that are *inner* or named like a component, and its folders of embeddings.

    None if it is gone: reading the files says so.
    """
    found = _noted(folder)
    try:
        for entry in _entries(folder):
            if entry.is_dir():
                found += [entry.name] if is_embeddings_folder(entry.name) else []
                looks_in = entry.name in inner or is_component(entry.name)
                files = _entries(folder / entry.name) if looks_in else []
                found += [f"{entry.name}/{each.name}" for each in files if each.is_file()]
            else:
                found.append(entry.name)
    except OSError:
        return []
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in itertools.islice(entries, _MAX_LISTED) if not entry.name.startswith(".")]

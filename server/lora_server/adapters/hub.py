"""Adapters from the Hugging Face hub: a repository at a revision, fetched into a folder of the server's own.

    hub://OWNER/NAME@REVISION         the adapter of a repository
    hub://OWNER/NAME/FILE@REVISION    one .safetensors file of it

    FOLDER/OWNER--NAME/COMMIT/...     what was fetched of a commit; true files, no links
    FOLDER/OWNER--NAME/refs/REVISION  the commit that a branch or tag meant last, for when the hub cannot be asked

Owns which files count there, that nothing larger than allowed is fetched, and that what is kept stays within bounds:
whatever is removed can be fetched again. The token is the environment's HF_TOKEN,
and no other; a commit that has been fetched is never asked for again. Blocks on the network.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from lora_server.adapters.companions import note_listing
from lora_server.adapters.disk import disk_errors
from lora_server.adapters.embedding_names import adapters_among
from lora_server.adapters.selection import SUFFIX, is_weights
from lora_server.adapters.source import (
    CARD_FILE,
    CONFIG_FILE,
    DIFFUSERS_FILE,
    HUB_SCHEME,
    SETTINGS_FILE,
    WEIGHTS_FILE,
)
from lora_server.adapters.store import StoreLimits
from lora_server.errors import (
    AdapterFileTooLargeError,
    AdapterMalformedError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
    DiskFullError,
    HubUnavailableError,
    StoreFullError,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}"
_PATH = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>[^\0]+))?@(?P<revision>[^@\0]{{1,200}})")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DONE = ".complete"
_MAX_QUOTED = 150
_TIMEOUT_S = 30.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
GRACE_S = 60.0
"""For so long after it was named, a download is not removed: it is being read, perhaps."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubPath:
    """What a source of the hub names: a repository, perhaps one file of it, and a branch, tag or commit."""

    repo: str
    file: str | None
    revision: str

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Reads what follows `hub://`; AdapterSourceNotFoundError if it is none."""
        match = _PATH.fullmatch(text)
        if (
            match is None
            or any(".." in part for part in (match["repo"], match["revision"]))
            or not _is_below(match["file"])
        ):
            raise AdapterSourceNotFoundError(HUB_SCHEME + text, "is not hub://OWNER/NAME[/FILE]@REVISION")
        return cls(match["repo"], match["file"], match["revision"])

    def __str__(self) -> str:
        return f"{HUB_SCHEME}{self.repo}{f'/{self.file}' if self.file else ''}@{self.revision}"


def refuse(text: str) -> Path:
    """What a server does with hub sources unless its operator allows them."""
    raise AdapterSourceForbiddenError(HUB_SCHEME + text, "hub ids are off on this server; its operator may --allow-hub")


def not_on_hub(path: str) -> AdapterSourceNotFoundError:
    """What is said of a repository that is not there, or that a caller must not know to be there."""
    return AdapterSourceNotFoundError(path, "is not on the hub, or not for the server's token (HF_TOKEN)")


class Hub:
    """Fetches adapters. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        components: tuple[str, ...],
        max_file_bytes: int,
        endpoint: str | None = None,
        limits: StoreLimits | None = None,
    ) -> None:
        """*components* may have sub-folders of their own; *endpoint* is the hub's address, None for the usual one.

        *limits* are of all that is kept, and of the disk.
        """
        self._limits = limits or StoreLimits()
        self._lock = threading.Lock()
        self._folder = folder.resolve()
        self._components = components
        self._max_file_bytes = max_file_bytes
        self._endpoint = endpoint

    def fetch(self, text: str) -> Path:
        """Returns the folder or file that what follows `hub://` means; fetches it unless it is there.

        Raises:
            AdapterSourceNotFoundError: If there is no such repository, revision or file, or not for the token.
            AdapterMalformedError: If the repository has no single adapter.
            AdapterFileTooLargeError: If a file is larger than allowed; nothing is fetched.
            StoreFullError, DiskFullError: If there is no room for it; nothing is fetched.
            HubUnavailableError: If the hub cannot be asked, and it was not fetched before.
        """
        path = HubPath.parse(text)
        repo = self._folder / path.repo.replace("/", "--")
        commit = path.revision if _COMMIT.fullmatch(path.revision) else self._commit(path, repo)
        folder = repo / commit
        done = folder / f"{_DONE}{'-' + _short(path.file) if path.file else ''}"
        if not done.exists():
            self._asking(path, lambda api: self._download(api, path, commit, folder))
        with disk_errors(0, self._limits.min_free_bytes):
            done.touch()  # it is wanted now
        return folder / path.file if path.file else folder

    def sweep(self, needed: Callable[[], Collection[Path]], grace_s: float) -> int:
        """Removes the downloads in which none of the *needed* places lies, but for those named within *grace_s*.

        Returns how many. What cannot be removed stays until the next time.
        """
        with self._lock:
            kept = tuple(needed())
            unneeded = [
                folder
                for folder, used_s, _ in self._downloads()
                if used_s <= time.time() - grace_s and not any(place.is_relative_to(folder) for place in kept)
            ]
            for folder in unneeded:
                shutil.rmtree(folder, ignore_errors=True)
        return len(unneeded)

    def _make_room(self, needed_bytes: int) -> None:
        """Removes the least recently named downloads until so many bytes more may be kept."""
        with self._lock:
            downloads = sorted(self._downloads(), key=lambda each: each[1])
            used_bytes = sum(size for *_, size in downloads)
            for folder, used_s, size in downloads:
                if used_bytes + needed_bytes <= self._limits.max_bytes or used_s > time.time() - GRACE_S:
                    break
                shutil.rmtree(folder, ignore_errors=True)
                used_bytes -= size
        if used_bytes + needed_bytes > self._limits.max_bytes:
            raise StoreFullError(needed_bytes, used_bytes, self._limits.max_bytes, "--max-hub-bytes")
        with disk_errors(needed_bytes, self._limits.min_free_bytes):
            self._folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes - needed_bytes < self._limits.min_free_bytes:
            raise DiskFullError(needed_bytes, free_bytes, self._limits.min_free_bytes)

    def _downloads(self) -> list[tuple[Path, float, int]]:
        """Every commit's folder, when it was last named (Unix time), and its bytes; whole or not."""
        found = []
        for folder in self._folder.glob("*/*"):
            if _COMMIT.fullmatch(folder.name):
                stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
                used_s = max((each.st_mtime for each in stats), default=0.0)
                found.append((folder, used_s, sum(each.st_size for each in stats)))
        return found

    def _commit(self, path: HubPath, repo: Path) -> str:
        """Asks which commit a branch or tag means now; what it meant last, if the hub cannot be asked."""
        ref = repo / "refs" / _short(path.revision)
        try:
            commit = self._asking(path, lambda api: _commit_of(api, path))
        except HubUnavailableError:
            if ref.exists():
                return ref.read_text(encoding="ascii")
            raise
        with disk_errors(len(commit), self._limits.min_free_bytes):
            ref.parent.mkdir(parents=True, exist_ok=True)
            aside = ref.with_name(f"{ref.name}.{os.getpid()}.{threading.get_ident()}.new")
            aside.write_text(commit, encoding="ascii")
            aside.replace(ref)
        return commit

    def _download(self, api: HfApi, path: HubPath, commit: str, folder: Path) -> None:
        if path.revision == commit:  # else it has been asked for
            _commit_of(api, path)
        sizes = {
            entry.path: entry.size
            for entry in api.list_repo_tree(path.repo, recursive=True, revision=commit)
            if hasattr(entry, "size") and hasattr(entry, "blob_id")
        }
        for name in self._wanted(path, sizes):
            if sizes[name] > self._max_file_bytes:
                raise AdapterFileTooLargeError(str(path), name, sizes[name], self._max_file_bytes)
        self._make_room(sum(sizes[name] for name in self._wanted(path, sizes)))
        for name in self._wanted(path, sizes):
            try:
                api.hf_hub_download(path.repo, name, revision=commit, local_dir=folder)
            except OSError as error:
                if error.errno in _OF_THE_DISK:  # else it is the network's
                    with disk_errors(sizes[name], self._limits.min_free_bytes):
                        raise
                raise
            except ValueError as error:
                detail = f"the hub's library refuses the name {name!r}"
                raise AdapterSourceNotFoundError(str(path), detail) from error
        with disk_errors(0, self._limits.min_free_bytes):
            note_listing(folder, path.file, sizes)

    def _wanted(self, path: HubPath, sizes: Mapping[str, int]) -> list[str]:
        """The files that count, as in a folder on disk (`source`), and the cards beside them."""
        if path.file is not None:
            if path.file not in sizes or not path.file.endswith(SUFFIX):
                raise AdapterSourceNotFoundError(str(path), f"the repository has no such {SUFFIX} file")
            return [path.file]
        cards = [name for name in (CARD_FILE, SETTINGS_FILE) if name in sizes]
        prefixes = ["", *(f"{component}/" for component in self._components)]
        files = [prefix + file for prefix in prefixes for file in (CONFIG_FILE, WEIGHTS_FILE) if prefix + file in sizes]
        if files:
            return files + cards
        weights = adapters_among(sorted(name for name in sizes if is_weights(name) and "/" not in name))
        if DIFFUSERS_FILE in weights:
            return [DIFFUSERS_FILE, *cards]
        if len(weights) == 1:
            return weights + cards
        if not weights:
            raise AdapterMalformedError(str(path), f"has no {CONFIG_FILE} and no {SUFFIX} file at its top")
        detail = f"has {len(weights)} {SUFFIX} files; name one, such as {HUB_SCHEME}{path.repo}/{weights[0]}@..."
        raise AdapterMalformedError(str(path), detail, weights[1])

    def _asking(self, path: HubPath, ask: Callable[[HfApi], T]) -> T:
        """Asks the hub; its errors become those of the house."""
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        api = HfApi(endpoint=self._endpoint, token=os.environ.get("HF_TOKEN") or False)
        try:
            return ask(api)
        except GatedRepoError as error:
            detail = "is gated: accept its licence on the hub, and give the server a token by HF_TOKEN"
            raise AdapterSourceNotFoundError(str(path), detail) from error
        except RepositoryNotFoundError as error:
            raise not_on_hub(str(path)) from error
        except RevisionNotFoundError as error:
            raise AdapterSourceNotFoundError(str(path), "the repository has no such revision") from error
        except LocalEntryNotFoundError as error:  # what the library makes of a lost connection
            raise HubUnavailableError(path.repo) from error
        except EntryNotFoundError as error:
            raise AdapterSourceNotFoundError(str(path), "the file is not there any more") from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (401, 403):
                detail = "is not for the server's token (HF_TOKEN)"
                raise AdapterSourceNotFoundError(str(path), detail) from error
            raise HubUnavailableError(path.repo) from error
        except (httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
            raise HubUnavailableError(path.repo) from error


def _commit_of(api: HfApi, path: HubPath) -> str:
    """Returns the commit that a revision means.

    A repository that is called something else by now is as good as none: the hub would lead from its old name to it,
    past what is bound or granted under the new one.
    """
    info = api.repo_info(path.repo, revision=path.revision, timeout=_TIMEOUT_S)
    if info.id.casefold() != path.repo.casefold():
        raise not_on_hub(str(path))
    if not isinstance(info.sha, str) or _COMMIT.fullmatch(info.sha) is None:
        raise AdapterSourceNotFoundError(str(path), "the hub names no commit for this revision")
    return info.sha


def _is_below(file: str | None) -> bool:
    """Whether a file's path stays in its repository."""
    return file is None or not any(part in ("", ".", "..") for part in file.split("/"))


def _short(name: str) -> str:
    """A name that may be any file's, as that of one; a long one by its hash."""
    quoted = quote(name, safe="")
    return quoted if len(quoted) <= _MAX_QUOTED else hashlib.sha256(name.encode()).hexdigest()

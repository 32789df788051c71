"""Adapters from the hub, against a small server that speaks its API."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_client._requests import source_message
from lora_server.adapters.hub import Hub, HubPath, refuse
from lora_server.adapters.naming import name_for
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.adapters.store import StoreLimits
from lora_server.errors import (
    AdapterFileTooLargeError,
    AdapterMalformedError,
    AdapterSourceForbiddenError,
    AdapterSourceNotFoundError,
    DiskFullError,
    HubUnavailableError,
    StorageFailedError,
    StoreFullError,
)
from lora_server.rpc.convert import adapter_source

from tests.fake_hub import FakeHub, serving_hub

PEFT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"card"}
EXTRA = {"optimizer.pt": b"pickle", "checkpoint-1/adapter_model.safetensors": b"old", "text_encoder/x.bin": b"no"}


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub, which may be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving_hub() as hub:
        yield hub


@pytest.fixture
def hub(remote: FakeHub, tmp_path: Path) -> Hub:
    """Ours, with a limit of 100 bytes a file."""
    return Hub(tmp_path, ("text_encoder", "transformer"), 100, remote.url)


def files(folder: Path) -> set[str]:
    """What was fetched."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".")}


def test_a_repository_is_read_as_a_folder_would_be(hub: Hub, remote: FakeHub) -> None:
    """The files that count and the card, true files; nothing else is fetched, and nothing twice."""
    commit = remote.push("me/style", {**PEFT, **EXTRA, "text_encoder/adapter_config.json": b"{}"})
    folder = hub.fetch("me/style@main")
    assert folder.name == commit
    assert files(folder) == {*PEFT, "text_encoder/adapter_config.json"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    before = len(remote.requests)
    assert hub.fetch(f"me/style@{commit}") == folder
    assert len(remote.requests) == before
    assert hub.fetch("me/style@main") == folder
    assert len(remote.requests) == before + 1
    assert {authorization for _, _, authorization in remote.requests} == {None}


def test_one_file_of_many_has_to_be_named(hub: Hub, remote: FakeHub) -> None:
    """By default only a single one is taken, or the one that diffusers writes."""
    remote.push("me/many", {"a.safetensors": b"a", "b.safetensors": b"b"})
    with pytest.raises(AdapterMalformedError, match="name one"):
        hub.fetch("me/many@main")
    place = hub.fetch("me/many/b.safetensors@main")
    assert (place.name, place.read_bytes()) == ("b.safetensors", b"b")
    assert hub.fetch("me/many/a.safetensors@main").read_bytes() == b"a"
    remote.push("me/one", {"x.safetensors": b"x", "model/y.safetensors": b"y" * 500})
    assert files(hub.fetch("me/one@main")) == {"x.safetensors"}
    remote.push("me/two", {"x.safetensors": b"x", "pytorch_lora_weights.safetensors": b"y"})
    assert files(hub.fetch("me/two@main")) == {"pytorch_lora_weights.safetensors"}


def test_a_branch_that_moves_is_another_folder(hub: Hub, remote: FakeHub) -> None:
    """Old commits stay what they were; a branch may have slashes in its name."""
    first = hub.fetch(f"me/style@{remote.push('me/style', PEFT)}")
    remote.push("me/style", {**PEFT, "adapter_model.safetensors": b"new"})
    second = hub.fetch("me/style@main")
    assert first != second
    assert (second / "adapter_model.safetensors").read_bytes() == b"new"
    assert (first / "adapter_model.safetensors").read_bytes() == b"weights"
    remote.branches["me/style"]["refs/pr/1"] = first.name
    assert hub.fetch("me/style@refs/pr/1") == first


def test_a_hub_that_is_down_is_asked_again_later(hub: Hub, remote: FakeHub) -> None:
    """What was fetched is used as it was last; what was not is an error that says to retry."""
    remote.push("me/style", PEFT)
    folder = hub.fetch("me/style@main")
    remote.down = True
    assert hub.fetch("me/style@main") == folder
    with pytest.raises(HubUnavailableError) as refused:
        hub.fetch("me/other@main")
    assert refused.value.retry_after_s


def test_a_download_that_breaks_off_is_not_taken_for_whole(
    hub: Hub, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next use fetches what is missing."""
    remote.push("me/style", PEFT)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # which waits longer at each attempt
    remote.broken = {"adapter_model.safetensors"}
    with pytest.raises(HubUnavailableError):
        hub.fetch("me/style@main")
    remote.broken = set()
    assert files(hub.fetch("me/style@main")) == set(PEFT)


def test_the_token_is_the_environments(hub: Hub, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_TOKEN a private repository does not exist; a file of tokens in the home is not looked at."""
    remote.push("private/style", PEFT)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: remote.token)
    with pytest.raises(AdapterSourceNotFoundError, match="HF_TOKEN"):
        hub.fetch("private/style@main")
    monkeypatch.setenv("HF_TOKEN", remote.token)
    assert files(hub.fetch("private/style@main")) == set(PEFT)


MISSING = {
    "no/repository@main": "not on the hub",
    "me/style@nothing": "no such revision",
    "me/style/nothing.safetensors@main": "no such",
    "gated/style@main": "licence",
}


@pytest.mark.parametrize("path", MISSING)
def test_what_is_not_there_is_said_to_be_missing(hub: Hub, remote: FakeHub, path: str) -> None:
    """Repository, revision, file, or a licence that nobody accepted."""
    remote.push("me/style", PEFT)
    remote.push("gated/style", PEFT)
    with pytest.raises(AdapterSourceNotFoundError, match=MISSING[path]):
        hub.fetch(path)


def test_a_file_that_is_too_large_is_not_fetched(hub: Hub, remote: FakeHub, tmp_path: Path) -> None:
    """The limit is held before the first byte."""
    remote.push("me/large", {"x.safetensors": b"x" * 101})
    with pytest.raises(AdapterFileTooLargeError):
        hub.fetch("me/large@main")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "text", ["me@main", "me/style", "me/../style@main", "me/style@../x", "/me/style@main", "me/@x"]
)
def test_what_is_no_path_of_the_hub_is_refused(hub: Hub, text: str) -> None:
    """Before anything is asked, or any file named after it."""
    with pytest.raises(AdapterSourceNotFoundError, match="is not hub://"):
        hub.fetch(text)


def test_paths_read_as_they_are_written() -> None:
    """And a name is made from the repository's or file's."""
    for text in ("me/style@main", "me/style/deep/x.safetensors@refs/pr/1"):
        assert str(HubPath.parse(text)) == f"hub://{text}"
    assert name_for("hub://me/Style@main", 1, ()) == "style"
    assert name_for("hub://me/style/deep/Neon.safetensors@refs/pr/1", 1, ()) == "neon"


def test_a_server_that_does_not_allow_it_says_so() -> None:
    """The error names the flag."""
    with pytest.raises(AdapterSourceForbiddenError, match="--allow-hub"):
        refuse("me/style@main")


def named_long_ago(folder: Path, ago_s: float) -> None:
    """Makes a download look as if it had been named so long ago."""
    then_s = time.time() - ago_s
    for path in folder.rglob("*"):
        os.utime(path, (then_s, then_s))


def test_downloads_that_nobody_needs_are_swept(hub: Hub, remote: FakeHub) -> None:
    """But for those that are registered, and those that were named a moment ago; what is gone is fetched again."""
    folders = []
    for repo in ("me/a", "me/b", "me/c"):
        remote.push(repo, PEFT)
        folders.append(hub.fetch(f"{repo}@main"))
    named_long_ago(folders[0], 100)
    named_long_ago(folders[1], 100)
    assert hub.sweep(lambda: [folders[0]], 60) == 1
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert hub.sweep(lambda: [folders[0]], 0) == 1
    assert files(hub.fetch("me/b@main")) == set(PEFT)


def test_what_is_kept_of_the_hub_is_bounded(remote: FakeHub, tmp_path: Path) -> None:
    """The least recently named makes room; what is in use, or a full disk, does not."""
    hub = Hub(tmp_path, (), 100, remote.url)
    folders = {}
    for repo in ("me/a", "me/b"):
        remote.push(repo, PEFT)
        folders[repo] = hub.fetch(f"{repo}@main")
    named_long_ago(folders["me/b"], 200)
    named_long_ago(folders["me/a"], 100)
    remote.push("me/c", {"x.safetensors": b"x" * 90})
    hub = Hub(tmp_path, (), 100, remote.url, StoreLimits(max_bytes=sum(used(f) for f in folders.values()) + 50))
    hub.fetch("me/c@main")
    assert [folder.exists() for folder in folders.values()] == [True, False]
    remote.push("me/d", {"x.safetensors": b"x" * 90})
    with pytest.raises(StoreFullError):
        Hub(tmp_path, (), 100, remote.url, StoreLimits(max_bytes=1)).fetch("me/d@main")
    with pytest.raises(DiskFullError):
        Hub(tmp_path, (), 100, remote.url, StoreLimits(min_free_bytes=2**62)).fetch("me/d@main")


def used(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


NAMES = [
    "My Style (v2) [final]", "水彩", "a&b #1", "100%", "what?", "a+b", "ab: c", "-dash", "🎨", "e\u0301", "\xe9",
    "it's", "a@b", "a..b", "sub folder/x", "水" * 60,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_repository_may_have_any_name(hub: Hub, remote: FakeHub, name: str) -> None:
    """Fetched as it is called, alone and, at the top, as the only one of its repository; not fetched twice."""
    file = f"{name}.safetensors"
    remote.push("me/names", {file: b"x"})
    source = adapter_source(source_message(f"hub://me/names/{file}@main"))
    assert source.path == f"hub://me/names/{file}@main"
    assert hub.fetch(source.path.removeprefix("hub://")).read_bytes() == b"x"
    before = len(remote.requests)
    assert hub.fetch(f"me/names/{file}@main").name == Path(file).name
    assert len(remote.requests) == before + 1
    if "/" not in name:
        assert files(hub.fetch("me/names@main")) == {file}


@pytest.mark.parametrize("first", [True, False])
def test_what_else_is_fetched_of_a_repository_changes_no_source(hub: Hub, remote: FakeHub, first: bool) -> None:
    """A file before the whole, or after it; marks, hidden files and a training's state are nobody's weights."""
    content = {
        "style.safetensors": b"s", "optimizer.safetensors": b"o", "._style.safetensors": b"m",
        "checkpoint/style.safetensors": b"c",
    }  # fmt: skip
    commit = remote.push("me/style", content)
    sources = ["me/style/style.safetensors@main", "me/style/checkpoint/style.safetensors@main"]
    for source in [*sources, "me/style@main"] if first else ["me/style@main", *sources]:
        hub.fetch(source)
    folder = hub.fetch("me/style@main")
    assert folder.name == commit
    found = AdapterFolder(folder, ["text_encoder"], AdapterRoots([folder])).read(100)
    assert found.contents == {"style.safetensors": b"s"}


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, DiskFullError), (errno.EROFS, StorageFailedError), (errno.EIO, StorageFailedError)],
)
def test_a_disk_that_fails_is_not_taken_for_the_hub(
    hub: Hub, remote: FakeHub, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    """A download that cannot be written says so."""
    remote.push("me/style", PEFT)

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", fail)
    with pytest.raises(error):
        hub.fetch("me/style@main")


def test_a_name_that_the_hubs_library_refuses_is_said(hub: Hub, remote: FakeHub) -> None:
    """It takes one letter and a colon for a drive."""
    remote.push("me/style", {"a:b.safetensors": b"x"})
    with pytest.raises(AdapterSourceNotFoundError, match=r"refuses the name 'a:b\.safetensors'"):
        hub.fetch("me/style@main")

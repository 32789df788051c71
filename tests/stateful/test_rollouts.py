"""Requests for a name while its versions come and go: each gets a whole version, old or new, and none fails.

A few hundred each time; `ROLLOUT_REQUESTS=10000 pytest tests/stateful/test_rollouts.py` for as many as that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import UPLOAD_SCHEME, manifest_digest
from lora_server.adapters.state import StateFile
from lora_server.adapters.store import ContentStore, FileEntry
from lora_server.config import CacheConfig
from lora_server.engine.admission import _ATTEMPTS, _GONE
from lora_server.types import AdapterSource, AdapterUse, ByName, PinLevel

from tests.stateful.file_loader import FileLoader

REQUESTS = int(os.environ.get("ROLLOUT_REQUESTS", "300"))
THREADS = 6
CHANGES = 6
PAUSES_S = 0.02, 0.4
"""After a change: the next comes while the folder is not yet read, or after it was."""


class House:
    """A manager with room for four versions, over a root of folders and a state directory."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.store = ContentStore(folder / "state")
        self.file = StateFile(folder / "state" / "state.sqlite3")
        roots = AdapterRoots([self.root, self.store.root], {UPLOAD_SCHEME: self.store.place})
        config = CacheConfig(budget_bytes=1 << 20, max_adapters=4, device_slots=4, max_pinned_share=0.5)
        self.manager = AdapterManager(config, FileLoader(roots), store=self.store, state=self.file)
        self.manager.restore()
        self.whole: set[str] = set()

    def files(self, version: int) -> dict[str, bytes]:
        """A folder's files, of which each says whose it is."""
        return {name: f"{version} {name}".encode() for name in ("adapter_config.json", "adapter_model.safetensors")}

    def expect(self, files: dict[str, bytes]) -> None:
        """Notes that these are a version."""
        self.whole.add(
            manifest_digest({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()})
        )

    def push(self, version: int) -> None:
        """Uploads a version of `style`, as the handler does."""
        files = self.files(version)
        self.expect(files)
        listed = [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
        with self.store.begin("style", listed, bare=False) as incoming:
            for index, data in enumerate(files.values()):
                incoming.write(index, 0, data)
            digest = incoming.commit()
        loading = self.manager.load(AdapterSource(UPLOAD_SCHEME + digest, id=7, name="style"), replace=True)
        loading.add_done_callback(lambda _: self.manager.release_upload(digest))
        loading.result(30)
        self.manager.saved().result(30)

    def write(self, folder: Path, version: int) -> None:
        """Writes a version's files, one after the other."""
        files = self.files(version)
        self.expect(files)
        folder.mkdir(exist_ok=True)
        # By a process of its own: this one's threads would hold the writer up between two files.
        writes = (f"printf '%s' '{data.decode()}' > '{folder / name}'" for name, data in files.items())
        subprocess.run(["sh", "-c", "; ".join(writes)], check=True)

    def load(self, folder: Path) -> None:
        """Loads a folder as `style`, in place of whatever has the name."""
        self.manager.load(AdapterSource(str(folder), name="style"), replace=True).result(30)

    def draw(self) -> str:
        """What a request for `style` is drawn with: its leases taken, as admission takes them."""
        for attempt in range(_ATTEMPTS):
            (resolved,) = self.manager.resolve([AdapterUse(ByName("style"))]).result(30)
            try:
                with self.manager.acquire([resolved]).result(30) as lease:
                    (digest,) = lease.weights
                    return digest
            except _GONE:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def close(self) -> None:
        """Checks the books, and stops."""
        self.manager.check_integrity()
        self.manager.close()
        self.file.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """One of each test's own; another adapter comes and goes in its small cache."""
    made = House(tmp_path)
    yield made
    made.close()


def pushed(house: House, version: int) -> None:
    """A new version by upload."""
    house.push(version)


def overwritten(house: House, version: int) -> None:
    """A folder that is written file by file, and left to the requests to notice."""
    house.write(house.root / "style", version)
    time.sleep(PAUSES_S[version % 2])


def copied_anew(house: House, version: int) -> None:
    """A folder that is removed and copied, as `rm -r; cp -r` do."""
    house.write(house.root / "aside", version)
    subprocess.run(["sh", "-c", "rm -r style; cp -r aside style"], check=True, cwd=house.root)
    time.sleep(PAUSES_S[version % 2])


def reloaded(house: House, version: int) -> None:
    """`load --replace` of one folder after the other."""
    folder = house.root / f"v{version % 3}"
    shutil.rmtree(folder, ignore_errors=True)
    house.write(folder, version)
    house.load(folder)


def switched(house: House, version: int) -> None:
    """A link that leads to one folder after the other, as Kubernetes does it; the oldest goes."""
    house.write(house.root / f"v{version}", version)
    (house.root / "new").symlink_to(f"v{version}")
    (house.root / "new").replace(house.root / "style")
    shutil.rmtree(house.root / f"v{version - 2}", ignore_errors=True)
    time.sleep(0.02)


def pinned(house: House, version: int) -> None:
    """A new version of a name that is pinned and unpinned, with its copy in the store."""
    house.write(house.root / "style", version)
    house.manager.pin(ByName("style"), PinLevel.HOST).result(30)
    house.manager.unpin(ByName("style"))


@pytest.mark.parametrize("change", [pushed, overwritten, copied_anew, reloaded, switched, pinned])
def test_no_request_for_a_name_fails_while_its_versions_change(
    house: House, change: Callable[[House, int], None]
) -> None:
    """Six threads ask, one changes, one fills the cache with others; what is drawn is a version that was whole."""
    change_first = {pinned: overwritten}.get(change, change)
    change_first(house, 0)
    if change not in (pushed, reloaded):
        house.load(house.root / "style")
    (house.root / "other").mkdir()
    (house.root / "other" / "x.safetensors").write_bytes(b"another")
    left = iter(range(REQUESTS))
    versions = [0]
    drawn: list[str] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        while next(left, None) is not None or (versions[0] < CHANGES and not failed):
            try:
                drawn.append(house.draw())
            except BaseException as error:
                failed.append(error)

    def repeat(work: Callable[[], object]) -> None:
        while not done.is_set():
            try:
                work()
            except BaseException as error:
                failed.append(error)

    def change_once() -> None:
        change(house, versions[0] + 1)
        versions[0] += 1

    def crowd() -> None:
        house.manager.resolve([AdapterUse(AdapterSource(str(house.root / "other")))]).result(30)
        time.sleep(0.005)

    changing = [threading.Thread(target=repeat, args=(work,)) for work in (change_once, crowd)]
    asking = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in [*changing, *asking]:
        thread.start()
    for thread in asking:
        thread.join()
    done.set()
    for thread in changing:
        thread.join()
    assert not failed, f"{len(failed)} of {REQUESTS} failed: {failed[:3]!r}"
    assert set(drawn) <= house.whole
    assert len(drawn) >= REQUESTS
    assert len(set(drawn)) > 1

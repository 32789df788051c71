"""Kills a process of manager and store at random moments, and looks at what the next one finds. Imports no torch.

    python -m tests.stateful.kill_process FOLDER KILLS SEED

Each round forks a worker over one state directory. The worker changes adapters at random; before each change it says
what will be registered if it succeeds, and after its acknowledgement that it did. It is killed after a random time, or
in the middle of the start. The next worker's first words are what it restored: the last acknowledged state, or that
with the one change that was not acknowledged. Prints one line of figures; exits with 1 and the history at a difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import structlog
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import UPLOAD_SCHEME
from lora_server.adapters.state import StateFile
from lora_server.adapters.store import ContentStore, FileEntry
from lora_server.config import CacheConfig
from lora_server.errors import LoraServerError
from lora_server.types import AdapterSource, AdapterState, ByName, PinLevel

from tests.stateful.file_loader import FileLoader

NAMES = ("a", "b", "c", "d")
Known = dict[str, Any]
"""What is registered: [digest, pinned, default scale, tenants] by name."""
BINDINGS = (None, frozenset({"acme"}), frozenset({"acme", "zeta"}), frozenset[str]())
"""What a load says of tenants: nothing, which keeps a binding, some, or that all may use it."""


class Worker:
    """One life of the process."""

    def __init__(self, root: Path, out: int) -> None:
        self._out = out
        self.sources = root / "adapters"
        self.store = ContentStore(root / "state")
        self.file = StateFile(root / "state" / "state.sqlite3")
        roots = AdapterRoots([self.sources, self.store.root], {UPLOAD_SCHEME: self.store.place})
        config = CacheConfig(budget_bytes=10**6, device_slots=9)
        self.manager = AdapterManager(config, FileLoader(roots), store=self.store, state=self.file)

    def say(self, *words: Any) -> None:
        """Tells the parent, at once."""
        os.write(self._out, (json.dumps(words) + "\n").encode())

    def restored(self) -> Known:
        """Restores; checks that every pin is cached and every upload whole."""
        self.manager.restore(strict=True)
        found: Known = {}
        for adapter in self.manager.list():
            pinned = adapter.pin is not None
            assert not pinned or adapter.versions[0].state is AdapterState.CACHED, adapter
            if adapter.source.path.startswith(UPLOAD_SCHEME):
                digest = adapter.source.path.removeprefix(UPLOAD_SCHEME)
                assert f"sha256:{hashlib.sha256(self.store.place(digest).read_bytes()).hexdigest()}" == digest
            tenants = None if adapter.tenants is None else sorted(adapter.tenants)
            found[adapter.name] = [adapter.current_digest, pinned, adapter.default_scale, tenants]
        assert not list((self.store.root.parent / "incoming").iterdir())
        needed = self.manager._keeper._needed()
        assert self.store.digests() == needed, "orphans, or files that are missing"
        return found

    def run(self, chance: random.Random) -> None:
        """Changes adapters until it is killed."""
        known = self.restored()
        for name in NAMES:  # a file that was written for a load that was never acknowledged
            path = self.sources / f"{name}.safetensors"
            if path.exists() and known.get(name, [""])[0] != f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}":
                path.unlink()
        self.say("restored", known)
        while True:
            name = chance.choice(NAMES)
            change = chance.choice([self.push, self.push, self.load, self.pin, self.pin, self.unpin, self.unload])
            change(name, chance, known)

    def attempt(self, name: str, after: Any, work: Any) -> bool:
        """Does *work* and acknowledges it."""
        self.say("begin", name, after)
        try:
            work()
        except LoraServerError as error:
            self.say("failed", name, str(error))
            return False
        self.manager.saved().result(10)
        self.say("done", name)
        return True

    def push(self, name: str, chance: random.Random, known: Known) -> None:
        """Uploads random bytes."""
        data = b"x" + chance.randbytes(chance.choice([10, 5000]))
        digest, scale = f"sha256:{hashlib.sha256(data).hexdigest()}", chance.choice([0.5, 2.0])
        binding = chance.choice(BINDINGS)

        def work() -> None:
            entry = FileEntry("x.safetensors", len(data), digest.removeprefix("sha256:"))
            with self.store.begin(name, [entry], bare=True) as incoming:
                for offset in range(0, len(data), 1000):
                    incoming.write(0, offset, data[offset : offset + 1000])
                incoming.commit()
            loading = self.manager.load(
                AdapterSource(UPLOAD_SCHEME + digest, id=1 + NAMES.index(name), name=name),
                default_scale=scale,
                replace=True,
                tenants=binding,
            )
            loading.add_done_callback(lambda _: self.manager.release_upload(digest))
            loading.result(10)

        after = [digest, name in known and known[name][1], scale, _tenants(known, name, binding)]
        if self.attempt(name, after, work):
            known[name] = after

    def load(self, name: str, chance: random.Random, known: Known) -> None:
        """Loads a file that is written anew; it vanishes at once, so that a pin has only the server's own copy."""
        data = b"y" + chance.randbytes(50)
        path = self.sources / f"{name}.safetensors"
        pinned, scale = (known[name][1], known[name][2]) if name in known else (False, 1.0)
        binding = chance.choice(BINDINGS)
        path.write_bytes(data)

        def work() -> None:
            self.manager.load(AdapterSource(str(path), name=name), replace=True, tenants=binding).result(10)

        after = [f"sha256:{hashlib.sha256(data).hexdigest()}", pinned, scale, _tenants(known, name, binding)]
        if self.attempt(name, after, work):
            known[name] = after

    def pin(self, name: str, chance: random.Random, known: Known) -> None:
        """Pins, and lets the source vanish."""
        if name in known and self.attempt(
            name,
            [known[name][0], True, *known[name][2:]],
            lambda: self.manager.pin(ByName(name), chance.choice(list(PinLevel))).result(10),
        ):
            known[name][1] = True
            (self.sources / f"{name}.safetensors").unlink(missing_ok=True)

    def unpin(self, name: str, chance: random.Random, known: Known) -> None:
        """Unpins."""
        if name in known and self.attempt(
            name, [known[name][0], False, *known[name][2:]], lambda: self.manager.unpin(ByName(name))
        ):
            known[name][1] = False

    def unload(self, name: str, chance: random.Random, known: Known) -> None:
        """Unloads, if it is not pinned."""
        if name in known and self.attempt(name, None, lambda: self.manager.unload(ByName(name))):
            del known[name]


def life(root: Path, seed: int, after_s: float) -> list[Any]:
    """Lets one worker live for *after_s* seconds; returns what it said. An error of its own comes as `error`."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        try:
            Worker(root, write_end).run(random.Random(seed))
        except BaseException as error:  # its parent wants to know
            import traceback

            os.write(write_end, (json.dumps(["error", repr(error), traceback.format_exc()]) + "\n").encode())
        finally:
            os._exit(1)
    os.close(write_end)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as said:
        return [json.loads(line) for line in said.read().splitlines() if line.endswith(b"]")]


def main() -> int:
    """See the module's docstring."""
    root, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    (root / "adapters").mkdir(parents=True, exist_ok=True)
    (root / "state").mkdir(exist_ok=True)
    known: Known = {}
    pending: tuple[str, Any] | None = None
    changes = starts = 0
    for kill in range(kills + 1):
        final = kill == kills
        after_s = 1.0 if final else chance.choice([0.02, 0.06, 0.15, 0.3]) * chance.random()
        said = life(root, chance.randrange(2**32), after_s)
        for kind, *words in said:
            if kind == "restored":
                starts += 1
                (found,) = words
                accepted = [known, _with(known, pending)]
                if found not in accepted:
                    sys.stderr.write(f"kill {kill}: restored {found}\nacknowledged {known}\npending {pending}\n")
                    return 1
                known, pending = found, None
            elif kind == "begin":
                pending = (words[0], words[1])
            elif kind == "done":
                known, pending = _with(known, pending), None
                changes += 1
            elif kind == "failed":
                pending = None
            else:
                sys.stderr.write(f"kill {kill}: {words[0]}\n{words[1]}")
                return 1
    sys.stdout.write(f"{kills} kills, {starts} starts, {changes} acknowledged changes\n")
    return 0 if starts else 1


def _tenants(known: Known, name: str, binding: frozenset[str] | None) -> list[str] | None:
    """Whose *name* is after a load that says *binding*."""
    if binding is None:
        return known[name][3] if name in known else None
    return sorted(binding) or None


def _with(known: Known, change: tuple[str, Any] | None) -> Known:
    """What is known after a change."""
    if change is None:
        return known
    name, after = change
    kept = {key: value for key, value in known.items() if key != name}
    return kept if after is None else {**kept, name: after}


if __name__ == "__main__":
    sys.exit(main())

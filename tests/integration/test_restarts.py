"""The whole server, killed and started again over one state directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from lora_client import LoraClient

from tests.conftest import BIN
from tests.integration.test_uploads import pixels, serving


def test_a_killed_server_serves_what_it_had_acknowledged(demo_adapters: Path, tmp_path: Path) -> None:
    """Pushed, pinned and loaded adapters come back, the pinned one cached though its source is gone; and once more."""
    state, root = tmp_path / "state", tmp_path / "root"
    shutil.copytree(demo_adapters / "b", root / "b")
    shutil.copytree(demo_adapters / "text", root / "text")
    with serving(state, "--adapter-root", root, "--deterministic") as (address, _), LoraClient(address) as client:
        pushed = client.adapters.push(demo_adapters / "a", name="pushed", default_scale=0.5)
        client.adapters.load(str(root / "b"), name="pinned")
        client.adapters.pin("pinned", level="device")
        client.adapters.load(str(root / "text"), name="loaded")
        client.adapters.load(str(root / "text"), name="gone")
        client.adapters.unload("gone")
        picture = pixels(client, ["pushed", "pinned"])
    shutil.rmtree(root / "b")
    for _ in range(2):
        with serving(state, "--adapter-root", root, "--deterministic") as (address, _), LoraClient(address) as client:
            adapters = {adapter.name: adapter for adapter in client.adapters.list()}
            assert {"pushed", "pinned", "loaded", "neon"} <= set(adapters)
            assert "gone" not in adapters
            assert adapters["neon"].current.state == "cached", "the bundled ones are there before anybody asks"
            assert adapters["pinned"].current.state in ("cached", "resident")
            assert adapters["pinned"].pin is not None
            assert adapters["pinned"].pin.level == "device"
            assert (adapters["pushed"].default_scale, adapters["pushed"].ids) == (0.5, pushed.ids)
            assert adapters["pushed"].current.report == pushed.current.report
            assert pixels(client, ["pushed", "pinned"]) == picture


def test_a_second_server_is_refused_the_same_state(tmp_path: Path) -> None:
    """It says whose the directory is, and touches nothing."""
    with serving(tmp_path / "state"):
        before = sorted(os.listdir(tmp_path / "state"))
        command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--state-dir", tmp_path / "state"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1
        assert "another running server" in second.stderr
        assert sorted(os.listdir(tmp_path / "state")) == before


def test_a_pin_that_cannot_be_satisfied_is_listed(demo_adapters: Path, tmp_path: Path) -> None:
    """Source and copy are gone: the server serves all the same and says so, unless pins are strict."""
    state, root = tmp_path / "state", tmp_path / "root"
    shutil.copytree(demo_adapters / "b", root / "b")
    with serving(state, "--adapter-root", root) as (address, _), LoraClient(address) as client:
        client.adapters.load(str(root / "b"), name="pinned")
        client.adapters.pin("pinned")
    shutil.rmtree(root / "b")
    for entry in (state / "store").iterdir():
        shutil.rmtree(entry)
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--state-dir", state, "--adapter-root", root]
    strict = subprocess.run([*command, "--strict-pins"], capture_output=True, text=True, timeout=60, check=False)
    assert strict.returncode == 1
    assert "the pin of adapter 'pinned' cannot be satisfied" in strict.stderr
    with serving(state, "--adapter-root", root) as (address, _), LoraClient(address) as client:
        (adapter,) = client.adapters.list(states=["failed"])
        assert (adapter.name, adapter.pin is not None) == ("pinned", True)
        assert adapter.versions[0].failure
        assert client.generate("a red star").images


def test_a_server_without_a_state_directory_says_so() -> None:
    """In its log, before it serves."""
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline()
        finally:
            process.kill()
        assert "stateless" in process.stderr.read()

"""Clients in other languages, run for real against the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the Node example with its packages from the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm on this machine")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "generate.js"):
        shutil.copy(ROOT / "examples" / "node" / name, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=110)
    return folder


def run_node(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the example."""
    environment = {**os.environ, "LORA_PROTOS": str(ROOT / "protos")}
    command = ["node", "generate.js", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_node_generates_and_streams_progress(node_folder: Path, server_address: str) -> None:
    """@grpc/grpc-js with @grpc/proto-loader makes an image with an adapter."""
    done = run_node(node_folder, server_address, "x.png", "a red star", "neon")
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout
    assert "APPLICATION_WAY_MERGED" in done.stdout or "APPLICATION_WAY_SLOTS" in done.stdout  # by measured cost
    assert (node_folder / "x.png").read_bytes().startswith(b"\x89PNG")


def test_node_reads_the_code_of_an_error(node_folder: Path, server_address: str) -> None:
    """An unknown adapter arrives with its code and its sentence."""
    done = run_node(node_folder, server_address, "x.png", "a red star", "nobody")
    assert done.returncode == 1
    assert "NOT_FOUND: No adapter 'nobody'" in done.stderr


def test_the_examples_run(server_address: str, tmp_path: Path) -> None:
    """The Python examples of the README work as they are."""
    for name in ("generate.py", "many_adapters.py"):
        subprocess.run(
            [sys.executable, ROOT / "examples" / name, server_address], cwd=tmp_path, check=True, timeout=100
        )
    assert (tmp_path / "star.png").exists()

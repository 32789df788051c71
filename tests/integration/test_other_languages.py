"""Clients in other languages, installed, built and run for real against the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_client import GenerationOptions, LoraClient
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CANCELLED = 3
"""What the examples exit with when they cancelled, as they were told."""

Run = Callable[..., subprocess.CompletedProcess[str]]


def unavailable(what: str) -> None:
    """Skips on a developer's machine; fails in CI, where `make test` installs what is needed."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI must have it")
    pytest.skip(what)


def node_program(folder: Path) -> list[str]:
    """The Node example with its packages from the npm registry."""
    if shutil.which("npm") is None:
        unavailable("there is no npm on this machine")
    for name in ("package.json", "generate.js"):
        shutil.copy(EXAMPLES / "node" / name, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=110)
    return ["node", str(folder / "generate.js")]


def cpp_program(folder: Path) -> list[str]:
    """The C++ example, built with Debian's gRPC from stubs that its makefile makes."""
    subprocess.run([ROOT / "tools" / "install_cpp.sh"], check=True, timeout=100)
    if shutil.which("grpc_cpp_plugin") is None or shutil.which("g++") is None:
        unavailable("there is no C++ compiler with gRPC on this machine")
    subprocess.run(["make", "-j2", "-s", f"BUILD={folder}"], cwd=EXAMPLES / "cpp", check=True, timeout=110)
    return [str(folder / "generate")]


@pytest.fixture(scope="module", params=[node_program, cpp_program], ids=["node", "cpp"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server_address: str) -> Iterator[Run]:
    """Runs one language's example against the server, with options before its positional arguments."""
    folder = tmp_path_factory.mktemp("language")
    program = request.param(folder)
    environment = {**os.environ, "LORA_PROTOS": str(ROOT / "protos"), "RPC_PROTOS": str(EXAMPLES / "protos")}

    def run(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [*program, *options, server_address, str(output), "a red star"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    yield run
    shutil.rmtree(folder)


def test_it_writes_the_picture_that_every_client_gets(run: Run, server_address: str, tmp_path: Path) -> None:
    """The file has the very pixels that the Python client gets for the same prompt, seed and steps."""
    done = run(tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    with LoraClient(server_address) as client:
        client.generate("a red star", seed=42, options=GenerationOptions(num_inference_steps=4)).images[0].save(
            tmp_path / "same.png"
        )
    assert Image.open(tmp_path / "x.png").tobytes() == Image.open(tmp_path / "same.png").tobytes()


def test_it_applies_an_adapter(run: Run, tmp_path: Path) -> None:
    """With an adapter by name the picture is written, and the stats say how it was applied."""
    done = run(tmp_path / "x.png", "--adapter", "neon")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "way APPLICATION_WAY_MERGED" in done.stdout or "way APPLICATION_WAY_SLOTS" in done.stdout  # by measured cost


def test_it_streams_progress(run: Run, tmp_path: Path) -> None:
    """Every step is told, in order."""
    done = run(tmp_path / "x.png", "--steps", "3")
    done = run(tmp_path / "x.png", "--steps", "3")
    assert [line for line in done.stdout.splitlines() if line.startswith("step")] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
    ]


def test_it_reads_the_reason_of_an_error(run: Run, tmp_path: Path) -> None:
    """An unknown adapter arrives as code, sentence, and google.rpc.ErrorInfo with its metadata; no file is written."""
    done = run(tmp_path / "x.png", "--adapter", "nobody")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "code 5: No adapter 'nobody' is registered; load it first, or name its path.",
        "reason ADAPTER_NOT_FOUND domain lora-inference",
        "  adapter = nobody",
    ]
    assert not (tmp_path / "x.png").exists()


def test_its_cancel_ends_the_request(run: Run, server_address: str, tmp_path: Path) -> None:
    """After two of very many steps the client is done with CANCELLED, and the server no longer works on it."""
    done = run(tmp_path / "x.png", "--steps", "500", "--cancel-after", "2")
    assert done.returncode == CANCELLED, done.stderr
    assert "step 2/500" in done.stdout
    assert "step 500/500" not in done.stdout
    assert not (tmp_path / "x.png").exists()
    with LoraClient(server_address) as client:
        give_up = time.monotonic() + 3
        while client.server_info().queue["running_requests"] != 0:
            assert time.monotonic() < give_up, "the server still works on a cancelled request"
            time.sleep(0.02)


def test_the_examples_run(server_address: str, tmp_path: Path) -> None:
    """The Python examples of the README work as they are."""
    for name in ("generate.py", "many_adapters.py"):
        subprocess.run(
            [sys.executable, ROOT / "examples" / name, server_address], cwd=tmp_path, check=True, timeout=100
        )
    assert (tmp_path / "star.png").exists()

"""What `lora-server` prints, and how it ends: lines that drive no terminal, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_client.console import run_command
from lora_server import cli, inspect_command
from lora_server.types import LoadReport

from tests.conftest import BIN

Cli = Callable[..., tuple[object, str, str]]


@pytest.fixture
def server_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `lora-server` in this process; returns its exit code and what it wrote."""

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-server", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--bogus\x1b[31m",), 2),
        (("serve", "--bogus"), 2),
        (("serve", "--listen", "\x1b[31m:1"), 2),
        (("serve", "--listen", "[red]x"), 2),
        (("serve", "--threads", "1e400"), 2),
        (("serve", "--lora-scale", "nan", "--lora-path", "/nope"), 2),
        (("check-config", "--config", "/nope\x1b[31m"), 2),
        (("check-config", "--config", "/"), 2),
        (("check-config", "--model", "\udcff\x1b"), 2),
        (("token", "new"), 2),
        (("token", "new", "--role", "x\x1b"), 2),
        (("token", "new", "--role", "generate", "--tenant", "a\nb"), 2),
        (("health", "--timeout", "nan"), 1),
        (("health", "--timeout", "1e400"), 1),
        (("health", "--timeout", "-1"), 1),
        (("health", "--address", "x:99999"), 1),
        (("health", "--address", "http://x"), 1),
        (("health", "--tls-ca", "pyproject.toml"), 1),
        (("health", "--tls-ca", "/nope"), 1),
        (("health", "--tls-ca", "/dev/zero"), 1),
        (("health", "--tls-cert", "pyproject.toml"), 1),
        (("health", "--service", "\udcff"), 1),
        (("health", "--address", "unix:/nope", "--timeout", "0.1"), 2),
        (("inspect", "/nope\x1b[31m\n"), 1),
        (("inspect", "/"), 1),
        (("inspect", "pyproject.toml"), 1),
        (("inspect", "/", "--model", "/nope\x1b"), 1),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(server_cli: Cli, words: tuple[str, ...], code: int) -> None:
    """In lines that drive no terminal, with the documented code."""
    ended, out, err = server_cli(*words)
    assert (ended, out) == (code, "")
    assert err
    assert err.replace("\n", "").isprintable()
    assert "Traceback" not in err


HOSTILE = "a\x1b]0;x\x07\r\nforged 1\u202e\x9b[red]"


def report() -> LoadReport:
    """What a hostile file says of itself."""
    return LoadReport(
        dialect="peft", kinds=("lora",), min_rank=1, max_rank=1, min_alpha=1, max_alpha=1, components=(), size_bytes=1,
        digest="", base_model=HOSTILE, title=HOSTILE, trigger_words=(HOSTILE,), suggested_scale=None,
        num_unmatched_keys=12, unmatched_keys=(HOSTILE,) * 12, merged_only=False,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_inspect_prints_nothing_that_drives_a_terminal(
    server_cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Titles, trigger words and names of tensors come from strangers."""
    found = SimpleNamespace(report=report, digest=lambda: "sha256:0")
    monkeypatch.setattr(inspect_command, "Inspection", lambda *_, **__: found)
    code, out, _ = server_cli("inspect", "x", *flags)
    assert code == 0
    assert out.replace("\n", "").isprintable()
    assert not [line for line in out.splitlines() if line.startswith("forged")]
    if flags:
        assert json.loads(out)["title"] == HOSTILE
    else:
        assert "and 2 more" in out


def test_a_printed_configuration_drives_no_terminal(server_cli: Cli) -> None:
    """Whatever its values are."""
    code, out, _ = server_cli("serve", "--print-config", "--model", "a\x1b[31m\x9b\u2028\u202e")
    assert code == 0
    assert out.replace("\n", "").isprintable()


def test_an_unexpected_error_is_one_line(server_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LORA_DEBUG it is a traceback."""

    def fail(*_: Any) -> Any:
        raise KeyError("a\nb")

    monkeypatch.setattr(inspect_command, "Inspection", fail)
    code, _, err = server_cli("inspect", "x")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "LORA_DEBUG" in err
    monkeypatch.setenv("LORA_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["lora-server", "inspect", "x"])
    with pytest.raises(KeyError):
        run_command(cli._command, cli._tell)


def test_a_server_outlives_its_standard_output(tmp_path: Path) -> None:
    """Whoever started it may be gone when it serves; it ends with the code of its own end."""
    address = f"unix:{tmp_path}/s"
    read, write = os.pipe()
    os.close(read)
    command = [BIN / "lora-server", "serve", "--listen", address, "--threads", "1"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        from lora_client import LoraClient

        with LoraClient(address) as client:
            client.wait_ready(100)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(40)
    assert code == 0

"""`lora-client` without a server: where options may stand, what is printed where, and how a command ends."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_client import console
from lora_client.cli import app, generate, server
from lora_client.cli.common import Connection, find_ref
from lora_client.cli.generate import scaled
from lora_client.cli.listing import print_adapters
from lora_client.cli.main import main
from lora_client.cli.progress import is_live
from lora_client.cli.skip_layers import parse_skip_layers
from lora_client.types import Adapter, AdapterUse, Component, Pin, SkipLayerGuidance, Version
from rich.console import Console

from tests.client.test_client_tls import identity, serving
from tests.conftest import BIN

Cli = Callable[..., tuple[object, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `lora-client` in this process; returns its exit code and what it wrote."""
    monkeypatch.delenv("LORA_SERVER", raising=False)

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-client", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, err

    return run


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The connections that commands would open; none is opened."""
    opened: list[Connection] = []

    def open_(self: Connection, *_: Any) -> Any:
        opened.append(self)
        raise ValueError("not opened")

    monkeypatch.setattr(Connection, "open", open_)
    return opened


@pytest.mark.parametrize(
    "words",
    [
        ["--server", "h_h:1", "--timeout=2", "health"],
        ["health", "--server", "h_h:1", "--timeout", "2"],
        ["--server=x:1", "health", "--server=h_h:1", "--timeout=2"],
        ["adapters", "--timeout", "2", "list", "--server", "h_h:1"],
        ["adapters", "get", "--server", "h_h:1", "neon", "--timeout", "2"],
        ["--tls_ca=x", "adapters", "get", "neon", "--server", "h_h:1", "--timeout", "2"],
    ],
)
def test_shared_options_have_any_place_and_two_spellings(
    cli: Cli, connections: list[Connection], words: list[str]
) -> None:
    """Before the command or behind it; the last counts."""
    assert cli(*words)[2] == "error: not opened\n"
    assert (connections[0].server, connections[0].timeout_s) == ("h_h:1", 2.0)
    assert connections[0].tls_ca == ("x" if words[0].startswith("--tls") else None)


@pytest.mark.parametrize("text", ["--server=x:1", "--server", "--tls-ca=/x", "--num_images=3", "--", "-h", "--help"])
@pytest.mark.parametrize("glued", [True, False])
def test_a_value_is_never_an_option(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, connections: list[Connection], text: str, glued: bool
) -> None:
    """Whatever it looks like, and it stays as it was written."""
    made: list[Any] = []
    monkeypatch.setattr(generate, "GenerationOptions", lambda **fields: made.append(fields))
    words = [f"--negative-prompt={text}"] if glued else ["--negative-prompt", text]
    cli("generate", "--prompt", "x", *words)
    assert made[0]["negative_prompt"] == text
    assert connections[0].server == "127.0.0.1:50051"
    assert (connections[0].tls_ca, made[0]["num_images"]) == (None, 1)


def test_what_follows_two_dashes_is_no_option(cli: Cli, connections: list[Connection]) -> None:
    """Nor moved in front of them."""
    cli("adapters", "get", "--", "--server=x:1")
    assert connections[0].server == "127.0.0.1:50051"


def test_the_scale_option_scales_what_has_no_scale() -> None:
    """Names and paths alike; one scale for all."""
    given = [AdapterUse(name="a"), AdapterUse(name="b", scale=0.3), AdapterUse(path="/x")]
    assert [use.scale for use in scaled(given, [0.5])] == [0.5, 0.3, 0.5]
    assert scaled(given, []) == given


@pytest.mark.parametrize("words", [[], ["--lora", "a:1"], ["--lora", "a", "--lora-scale", "2"]])
def test_a_scale_that_would_be_lost_is_refused(cli: Cli, connections: list[Connection], words: list[str]) -> None:
    """Without an adapter, with one that has its own, or a second time."""
    code, _, err = cli("generate", "--prompt", "x", "--lora-scale", "0.5", *words)
    assert code == 2
    assert "--lora-scale" in err
    assert not connections


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("", None),
        ("7,8", SkipLayerGuidance((7, 8))),
        ("7:2.8,start=0.01,stop=0.2", SkipLayerGuidance((7,), 2.8, 0.01, 0.2)),
    ],
)
def test_skip_layers_are_read(text: str, guidance: SkipLayerGuidance | None) -> None:
    """With their numbers, if they are given."""
    assert parse_skip_layers(text) == guidance


@pytest.mark.parametrize("text", ["a", "-1", "7;8", "7,", "7:x", "7:nan", "7,start=1,start=1", "7,end=1", "start=1,7"])
def test_other_skip_layers_are_refused(text: str) -> None:
    """By the option's name."""
    with pytest.raises(ValueError, match="--skip-layers"):
        parse_skip_layers(text)


@given(st.text())
def test_what_is_printed_drives_no_terminal(text: str) -> None:
    """And what is plain stays as it is."""
    shown = console.printable(text)
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
    assert console.printable(shown) == shown
    if not {unicodedata.category(each) for each in text} & {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}:
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]52;c;eA==\x07", "\\x1b[2J\\x1b]52;c;eA==\\x07"),
        ("\x9b31m\x08\r\n\t", "\\x9b31m\\x08\\r\\n\\t"),
        (
            "\u202e\u2066\u200b\u200d\ufeff\u2028\u2029\u061c",
            "\\u202e\\u2066\\u200b\\u200d\\ufeff\\u2028\\u2029\\u061c",
        ),
        ("\U000e0041\ud800\x7f", "\\U000e0041\\ud800\\x7f"),
        ("a b ä 中 ★ [red]x[/red]", "a b ä 中 ★ [red]x[/red]"),
    ],
)
def test_controls_become_escapes(text: str, shown: str) -> None:
    """Of C0 and C1, directions, zero width, tags, surrogates; markup means nothing."""
    assert console.printable(text) == shown


def test_json_has_no_character_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    """DEL too, which JSON may have raw."""
    value = {"a\x7f\x9b": "\x1b\u202e\ud800"}
    console.print_json(value)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out) == value


def version(**fields: Any) -> Version:
    """A version of an adapter."""
    given = {"digest": "sha256:" + "0a" * 32, "size_bytes": 1536 * 1024, "rank": 8, "state": "cached", "failure": ""}
    components = (Component("text_encoder", 1, 8, 8), Component("transformer", 9, 8, 8))
    return Version(**{**given, "components": components, "load_time": None, "last_use_time": None, **fields})


NAME = "n" * 128
ADAPTERS = [
    Adapter(NAME, (2**63 - 1, 7), "/a", (version(),), version().digest, Pin("host", datetime.now(UTC)), 0.5),
    Adapter("b\x1b[31m", (8,), "/b", (version(state="x y"),), version().digest, None, 1.0),
]


def test_a_list_in_a_pipe_has_whole_values_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """One line an adapter, no word cut or wrapped, as many words in each line."""
    print_adapters(ADAPTERS)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["name", "state", "rank", "size", "scale", "pin", "components", "ids", "digest"]
    assert rows[0] == [
        NAME, "cached", "8", "1.5MiB", "0.5", "host", "text_encoder,transformer", f"{2**63 - 1},7", version().digest,
    ]  # fmt: skip
    assert rows[1][:6] == ["b\\x1b[31m", "x_y", "8", "1.5MiB", "1", "-"]


def test_a_narrow_terminal_loses_columns_and_no_letters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name stays whole even where it alone is wider."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_adapters(ADAPTERS)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["name", "state", "rank", "size", "scale", "pin"]
    assert rows[0][0] == NAME


@pytest.mark.parametrize(
    ("env", "isatty", "live"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False, False),
    ],
)
def test_only_a_terminal_that_moves_its_cursor_is_drawn_on(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], isatty: bool, live: bool
) -> None:
    """Everything else gets plain lines, which are never cut."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: isatty)
    assert is_live(Console(file=file)) is live


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_without_the_letter_replaces_it(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """On both streams; no UnicodeEncodeError."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert console.run_command(lambda: (console.print_line("中a"), console.tell("中b"))[1], lambda _: 1) == 0
    assert [stream.buffer.getvalue() for stream in streams] == [b"?a\n", b"?b\n"]  # type: ignore[attr-defined]


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """With LORA_DEBUG it is a traceback."""

    def fail(_: Any) -> Any:
        raise KeyError("a\nb")

    monkeypatch.setattr(Connection, "open", fail)
    code, _, err = cli("health")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "KeyError" in err
    assert "LORA_DEBUG" in err
    monkeypatch.setenv("LORA_DEBUG", "1")
    with pytest.raises(KeyError):
        console.run_command(lambda: app.run(["health"]), lambda _: 1)


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """Without a line."""

    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "open", interrupt)
    assert cli("health") == (130, "", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Usage"), (("--bogus\x1b[31m",), "No such option"), (("generate",), "--prompt"),
        (("generate", "--prompt", "x", "--seed", "1e400"), "--seed"),
        (("generate", "--prompt", "x", "--output", "/nope/x.png"), "/nope"),
        (("generate", "--prompt", "x", "--output", "/"), "/"),
        (("generate", "--prompt", "x", "--output", "x.gif"), "x.gif"),
        (("generate", "--prompt", "x", "--timeout", "nan"), "timeout"),
        (("health", "--timeout", "1e400"), "timeout"),
        (("health", "--server", "http://x"), "URL"),
        (("health", "--tls-ca", "/nope"), "/nope"), (("health", "--tls-ca", "/"), "/"),
        (("health", "--tls-ca", "pyproject.toml"), "PEM"), (("health", "--tls-key", "x"), "--tls-cert"),
        (("health", "--tls-server-name", "x"), "--tls"),
        (("adapters", "pin", "a", "--level", "disk"), "--level"), (("adapters", "pin", "a", "--ttl", "nan"), "ttl"),
        (("adapters", "load", "/x", "--scale", "inf"), "scale"), (("adapters", "load", "/x", "--id", "-1"), "id"),
        (("adapters", "list", "--state", "warm"), "warm"),
        (("top", "--interval", "nan"), "interval"), (("top", "--count", "0"), "--count"),
        (("show", "/nope\x1b[31m"), "/nope"), (("show", "/"), "/"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_without_a_traceback(cli: Cli, words: tuple[str, ...], said: str) -> None:
    """In one line that names what is wrong, with an exit code of its own."""
    code, out, err = cli(*words)
    assert code in (1, 2)
    assert not out
    assert said in err
    assert err.replace("\n", "").isprintable()
    assert len(err.splitlines()) == 1 or not words


@pytest.mark.parametrize("text", ["\u0663", "\u00b2", "9" * 5000])
def test_other_digits_are_a_name(text: str) -> None:
    """Which the server does not know; it is not asked for that."""
    with Connection("127.0.0.1:1").open() as nobody:
        assert find_ref(nobody, text) == text


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_nothing_listens(cli: Cli, tmp_path: Path) -> None:
    """The address, what to start, and which flag; on a socket's path too."""
    for address in (f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/x"):
        code, _, err = cli("health", "--server", address, "--timeout", "20")
        assert code == 4
        assert err == (
            f"error: nothing listens on {address}; start a server there with `lora-server serve --listen {address}`, "
            "or name another with --server\n"
        )


def test_tls_that_does_not_fit_is_told(cli: Cli, tmp_path: Path) -> None:
    """With the flag that would: for a TLS server, for one of another authority, and for another name."""
    own, other = identity("lora.example", loopback=False), identity("x")
    (tmp_path / "own").write_bytes(own.certificate)
    (tmp_path / "other").write_bytes(other.certificate)
    with serving(own) as address:
        ask = ("health", "--timeout", "1", "--server", address)
        assert "speaks TLS; give --tls-ca FILE" in cli(*ask)[2]
        assert "is not trusted" in cli(*ask, "--tls-ca", str(tmp_path / "other"))[2]
        assert "--tls-server-name" in cli(*ask, "--tls-ca", str(tmp_path / "own"))[2]
        named = cli(*ask, "--tls-ca", str(tmp_path / "own"), "--tls-server-name", "lora.example")
        assert named == (0, "SERVING\n", "")
        trusted = (*ask, "--tls-ca", str(tmp_path / "own"), "--tls-server-name", "lora.example")
        assert cli(*trusted, "--service", "x") == (3, "", "error: the server has no service 'x'\n")


def run(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of a shell."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **env}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("lora-client --help | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("lora-client --help > /dev/full", 1, "error: No space left on device\n"),
        ("lora-client --help >&-", 0, ""),
        ("lora-client --bogus 2> /dev/full", 2, ""),
        ("lora-client --bogus 2>&-", 2, ""),
        ("lora-server version | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("lora-server version > /dev/full", 1, "error: standard output: No space left on device\n"),
    ],
)
def test_an_output_that_nobody_takes_is_no_traceback(command: str, code: int, said: str) -> None:
    """The exit code is right, and not Python's 120."""
    done = run(command)
    assert (done.returncode, done.stderr) == (code, said)


def test_grpcs_core_writes_no_lines(tmp_path: Path) -> None:
    """Where a certificate cannot be used, its own lines would stand around ours."""
    pem = tmp_path / "x.pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for command in ("lora-client --server 127.0.0.1:9 --timeout 1 health", "lora-server health --timeout 1"):
        done = run(f"{command} --tls-ca {pem}")
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1


def test_info_is_printed_line_by_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server says of itself drives no terminal either."""
    from lora_client.types import ServerInfo

    class Client:
        """A server that lies."""

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def server_info(self) -> ServerInfo:
            hostile = {"a\x1b[31m": "\x1b]0;x\x07", "b": ["\r\n"], "c": {"[red]": "\u202e"}}
            return ServerInfo("1\n", datetime.now(UTC), hostile, {}, {}, {}, {}, None)  # type: ignore[arg-type]

    context: Any = type("Context", (), {"obj": type("Connection", (), {"open": lambda *_: Client()})()})()
    server.info(context)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert "[red] \\u202e" in out

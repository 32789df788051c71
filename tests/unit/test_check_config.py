"""`lora-server check-config` and `token new`: what they say, and their exit codes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from lora_server.cli import app
from lora_server.config import RpcConfig, ServerConfig
from lora_server.preflight import network_faults
from lora_server.security.tokens import read_tokens
from typer.testing import CliRunner

runner = CliRunner()


def test_a_good_configuration_is_valid(tmp_path: Path) -> None:
    """Folders, certificates and tokens that are there: exit code 0; --print-config shows where each came from."""
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    made = runner.invoke(app, ["token", "new", "--role", "admin", "--role", "generate", "--tenant", "acme"])
    token, line = made.stdout.splitlines()
    (tmp_path / "tokens").write_text(line)
    assert read_tokens(tmp_path / "tokens").find(token) is not None
    flags = ["--listen", "0.0.0.0:50051", "--metrics-listen", "localhost:0"]
    flags += ["--adapter-root", tmp_path, "--token-file", tmp_path / "tokens"]
    flags += ["--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.pem"]
    checked = runner.invoke(app, ["check-config", *map(str, flags)])
    assert (checked.exit_code, checked.stdout) == (0, "the configuration is valid\n")
    printed = runner.invoke(app, ["check-config", "--print-config", *map(str, flags)])
    assert f'token_file = "{tmp_path / "tokens"}"  # flag --token-file' in printed.stdout
    assert token not in printed.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/model"], "model.model: '/no/such/model'"),
        (["--model", "EMPTY"], "no model_index.json"),
        (["--model-config", "/nowhere"], "model.config_folder: '/nowhere' is no folder"),
        (["--adapter-root", "/nowhere"], "adapter_roots: '/nowhere' is no folder"),
        (["--lora-path", "x=/nowhere"], "preloads: '/nowhere' does not exist"),
        (["--listen", "unix:/nowhere/s"], "rpc.listen: no socket"),
        (["--listen", "unix:FILE"], "FILE' is there and is no socket"),
        (["--listen", f"unix:/tmp/{'x' * 110}"], "rpc.listen: the path of a socket has at most 107 bytes"),
        (["--listen", "127.0.0.1:65536"], "rpc.listen: '127.0.0.1:65536' has no port; ports are 0 to 65535"),
        (["--metrics-listen", "9464"], "telemetry.metrics_listen (flag --metrics-listen)"),
        (["--metrics-listen", "127.0.0.1:99999"], "telemetry.metrics_listen: '127.0.0.1:99999' has no port"),
        (["--listen", "127.0.0.1:9464", "--metrics-listen", ":9464"], "is taken by rpc.listen"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "tls: cannot read '/nowhere'"),
        (["--token-file", "/nowhere"], "auth.token_file: cannot read '/nowhere'"),
        (["--config", "/nowhere"], "cannot read the configuration file '/nowhere'"),
        (["--cache-bytes", "4XB"], "cache.budget_bytes (flag --cache-bytes): '4XB' is not a size"),
        (["--threads", "many"], "engine.threads (flag --threads)"),
        (["--log-level", "loud"], "log.level (flag --log-level)"),
        (["--lora-path", "/a", "--lora-scale", "1000"], "must be from -100 to 100"),
        (["--listen", "0.0.0.0:1"], "in plain text"),
    ],
)
def test_every_fault_is_said_and_the_exit_code_is_2(tmp_path: Path, flags: list[str], message: str) -> None:
    """A path, a value, a combination: named with its setting, also by `serve`, which then starts nothing."""
    (tmp_path / "FILE").touch()
    flags = [str(tmp_path) if flag == "EMPTY" else flag.replace("FILE", str(tmp_path / "FILE")) for flag in flags]
    for command in ("check-config", "serve"):
        checked = runner.invoke(app, [command, *flags], env={"COLUMNS": "300"})
        assert checked.exit_code == 2, checked.output
        assert message in checked.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--insecure", "--listen", "192.0.2.1:50051"], "rpc.listen: this machine cannot listen on '192.0.2.1:50051'"),
        (["--metrics-listen", "192.0.2.1:9464"], "this machine cannot listen on '192.0.2.1:9464'"),
        (["--metrics-listen", "no.such.host.invalid:9464"], "telemetry.metrics_listen: 'no.such.host.invalid' in"),
        (["--metrics-listen", "a b:9464"], "telemetry.metrics_listen: 'a b' in"),
    ],
)
def test_an_address_that_this_machine_has_not_is_said(flags: list[str], message: str) -> None:
    """Only by `check-config`: the interface or the name server may be there at the next try."""
    checked = runner.invoke(app, ["check-config", *flags], env={"COLUMNS": "300"})
    assert checked.exit_code == 2, checked.output
    assert message in checked.stderr


def test_serve_leaves_a_missing_address_to_the_next_try() -> None:
    """Exit code 1, upon which a supervisor starts again, and not the 2 of a configuration that is not valid."""
    served = subprocess.run(
        [Path(sys.executable).with_name("lora-server"), "serve", "--insecure", "--listen", "192.0.2.1:50051"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert served.returncode == 1, served.stderr
    assert "192.0.2.1:50051" in served.stderr


def test_a_kernel_without_ipv6_is_no_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an address of each kind is fine where one of them can be bound."""
    found = [(socket.AF_INET6, 0, 0, "", ("::1", 0, 0, 0)), (socket.AF_INET, 0, 0, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    made = socket.socket

    def without_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return made(family, kind)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert network_faults(ServerConfig(rpc=RpcConfig(listen="localhost:0"))) == []


def test_several_faults_are_said_at_once() -> None:
    """An operator repairs them all, not one a try."""
    checked = runner.invoke(app, ["check-config", "--adapter-root", "/nowhere", "--token-file", "/nowhere"])
    assert checked.stderr.count("error: ") == 2


def test_a_hub_id_is_noted_as_not_checked() -> None:
    """What cannot be known without the hub is not claimed."""
    checked = runner.invoke(app, ["check-config", "--model", "owner/name"])
    assert checked.exit_code == 0
    assert "not checked" in checked.stderr


@pytest.mark.parametrize("flags", [["--role", "root"], ["--role", "admin", "--tenant", "a b"]])
def test_a_token_of_an_unknown_role_or_a_bad_tenant_is_not_made(flags: list[str]) -> None:
    """Exit code 2 and no token."""
    made = runner.invoke(app, ["token", "new", *flags])
    assert (made.exit_code, made.stdout) == (2, "")


def test_a_port_that_is_taken_is_no_fault_of_the_configuration() -> None:
    """It may be taken by the very server that runs with this configuration; `serve` says so when it cannot have it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        checked = runner.invoke(app, ["check-config", "--metrics-listen", address])
    assert checked.exit_code == 0, checked.output


def test_what_a_model_says_of_itself_is_checked(tmp_path: Path) -> None:
    """Names, configurations and headers, in the words of a start; `test_folder_weights` has the cases."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").touch()
    index = '{"_class_name": "PixArtSigmaPipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    (tmp_path / "model_index.json").write_text(index)
    checked = runner.invoke(app, ["check-config", "--model", str(tmp_path)])
    assert checked.exit_code == 2
    assert "the weights of vae are there as diffusion_pytorch_model.bin only" in checked.stderr


@pytest.mark.parametrize("name", ["Brand", "my brand", "", "-x", "x" * 129, "\u6c34"])
def test_a_preload_whose_name_nobody_could_ask_for_is_refused(tmp_path: Path, name: str) -> None:
    """By flag and by file, with the rule; `serve` makes the same check."""
    flag = runner.invoke(app, ["check-config", "--lora-path", f"{name}={tmp_path}"])
    (tmp_path / "config.toml").write_text(f'preloads = [{{ path = "{tmp_path}", name = "{name}" }}]', encoding="utf-8")
    file = runner.invoke(app, ["check-config", "--config", str(tmp_path / "config.toml")])
    serve = runner.invoke(app, ["serve", "--lora-path", f"{name}={tmp_path}"])
    for checked in (flag, file, serve):
        assert checked.exit_code == 2
        assert "must be 1 to 128 characters of a-z" in checked.output
    assert runner.invoke(app, ["check-config", "--lora-path", f"brand={tmp_path}"]).exit_code == 0

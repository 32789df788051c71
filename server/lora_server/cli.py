"""The command `lora-server`: serves, checks its configuration, probes health, makes tokens. Holds no logic."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from lora_client import console

from lora_server.config import RpcConfig, ServerConfig
from lora_server.flags import with_settings
from lora_server.inspect_command import inspect_command
from lora_server.settings import Resolved, as_toml
from lora_server.telemetry.line_output import LineOutput
from lora_server.telemetry.logs import ProcessLog
from lora_server.telemetry.standard_streams import fill_standard_descriptors
from lora_server.threads import let_threads_sleep
from lora_server.types import DEFAULT_TENANT

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves one diffusion model with thousands of LoRA adapters over gRPC.",
    rich_markup_mode=None,
)
tokens_app = typer.Typer(no_args_is_help=True, help="Bearer tokens.", rich_markup_mode=None)
app.add_typer(tokens_app, name="token")

_MAX_TIMEOUT_S = 86_400
_MAX_PEM_BYTES = 1024 * 1024
_HEALTH_ENV = "LORA_SERVER_HEALTH_TLS_"
"""Of variables for `health`, so that one command is every container's check, with TLS or without."""


@app.command()
@with_settings
def serve(resolved: Resolved, print_config: bool) -> None:
    """Serves a model until SIGTERM or SIGINT; a second signal ends at once.

    Prints one line with the address to standard output when it serves; logs go to standard error. Every setting can
    also come from the environment (LORA_SERVER_RPC_LISTEN) or from a TOML file; flags go before both.
    """
    if print_config:
        _print_config(resolved)
        return
    let_threads_sleep()
    _end_at_signals()
    from lora_server.preflight import faults

    config = resolved.config
    if not _told(faults(config)):
        raise typer.Exit(2)
    raise typer.Exit(_run(config))


@app.command("check-config")
@with_settings
def check_config(resolved: Resolved, print_config: bool) -> None:
    """Checks what `serve` would take, paths, certificates and tokens included, and starts nothing.

    Exit codes: 0 if a server can start with it, 2 with a line a fault on standard error.
    """
    from lora_server.preflight import content_faults, faults, network_faults, notes

    if print_config:
        _print_config(resolved)
    config = resolved.config
    if not _told([*(faults(config) or content_faults(config)), *network_faults(config)]):
        raise typer.Exit(2)
    for note in notes(config):
        console.tell(f"note: {note}")
    if not print_config:
        console.print_line("the configuration is valid")


def _print_config(resolved: Resolved) -> None:
    for line in as_toml(resolved).removesuffix("\n").split("\n"):
        console.print_line(line)


def _told(faults: Sequence[str]) -> bool:
    """Writes faults down; returns whether there are none."""
    for fault in faults:
        console.tell(f"error: {fault}")
    return not faults


@app.command()
def health(
    address: Annotated[
        str, typer.Option(help="HOST:PORT or unix:PATH; what a server listens on.", envvar="LORA_SERVER_RPC_LISTEN")
    ] = RpcConfig().listen,
    service: Annotated[str, typer.Option(help="Full name of a service; default: the whole server.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to connect, and to get an answer.")] = 5.0,
    tls: Annotated[bool, typer.Option("--tls", help="Connects by TLS with the system's roots.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Connects by TLS and trusts this PEM file.", envvar=f"{_HEALTH_ENV}CA")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The prober's certificate, for mutual TLS.", envvar=f"{_HEALTH_ENV}CERT")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The prober's private key, for mutual TLS.", envvar=f"{_HEALTH_ENV}KEY")
    ] = None,
    tls_server_name: Annotated[
        str | None, typer.Option(help="The name in the server's certificate.", envvar=f"{_HEALTH_ENV}SERVER_NAME")
    ] = None,
) -> None:
    """Asks a server for its health; needs no token.

    Exit codes, those of grpc_health_probe: 0 SERVING, 1 wrong usage, 2 no connection, 3 the call failed, 4 not serving.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the answer is one line; gRPC's core would add its own
    from lora_server.rpc.probe import BAD_USAGE, SERVING, Probe, reachable

    try:
        ca, key, certificate = map(_read_pem, (tls_ca, tls_key, tls_cert))
        if (key is None) != (certificate is None):
            raise ValueError("--tls-cert and --tls-key belong together")
        if not 0 < timeout <= _MAX_TIMEOUT_S:  # also for NaN
            raise ValueError(f"--timeout: {timeout} is not above 0 and at most {_MAX_TIMEOUT_S} seconds")
        service.encode()  # what no text of Unicode is, no message can have
        use_tls = tls or ca is not None or key is not None
        probe = Probe(reachable(address), service, timeout, use_tls, ca, key, certificate, tls_server_name)
    except (OSError, ValueError) as error:
        console.tell(f"error: {console.os_error_text(error) if isinstance(error, OSError) else error}")
        raise typer.Exit(BAD_USAGE) from None
    code, text = probe.ask()
    (console.print_line if code == SERVING else console.tell)(text)
    raise typer.Exit(code)


def _read_pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with path.open("rb") as file:
        data = file.read(_MAX_PEM_BYTES)
    if b"-----BEGIN " not in data:
        raise ValueError(f"{str(path)!r} is no PEM file (it has no line such as -----BEGIN CERTIFICATE-----)")
    return data


@tokens_app.command("new")
def new_token(
    role: Annotated[list[str], typer.Option(help="generate or admin; repeatable, for both.")],
    tenant: Annotated[str, typer.Option(help="Whose queue and whose adapters.")] = DEFAULT_TENANT,
) -> None:
    """Makes a token: prints it, this once, and the line for the token file, which cannot be turned back into it."""
    from lora_server.security.tokens import new_token

    try:
        token, line = new_token(role, tenant)
    except ValueError as error:
        console.tell(f"error: the token {error}")
        raise typer.Exit(2) from None
    console.print_line(token)
    console.print_line(line)


def _end_at_signals() -> None:
    """Ends the process with 0 at SIGTERM or SIGINT, until the server listens to them itself: nothing is lost yet."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os._exit(0))


def _run(config: ServerConfig) -> int:
    """Runs the server; an error at start is one line on standard error, and exit code 1."""
    log = ProcessLog(config.log.level, config.log.format)
    faulthandler.enable(log.original_fd)  # past the log's threads, which end with the process
    answers = LineOutput(sys.stdout.fileno())
    try:
        code, idle = _serve(config, log, answers)
    finally:
        answers.close()
        log.close()
    if not idle:
        os._exit(code)  # native code that still builds the model would abort while the interpreter is taken down
    return code


def _serve(config: ServerConfig, log: ProcessLog, answers: LineOutput) -> tuple[int, bool]:
    """Returns the exit code, and whether nothing of the server runs any more."""
    from lora_server.app import Server
    from lora_server.engine.warm_up import WarmUpError
    from lora_server.errors import LoraServerError
    from lora_server.models.registry import ModelLoadError
    from lora_server.monitoring.tracing import OtelMissingError

    def on_serving(address: str) -> None:
        answers.write_line(console.printable(f"lora-server serves {config.model.model} on {address}"))

    async def run() -> tuple[int, bool]:
        server = Server(config, lambda: log.dropped_lines)
        return await server.run(on_serving), server.idle

    try:
        return asyncio.run(run())
    except (OSError, ValueError, OtelMissingError, ModelLoadError, WarmUpError, LoraServerError) as error:
        log.write_line(f"error: {error}")
        return 1, True


app.command("inspect")(inspect_command)


@app.command("version")
def show_version() -> None:
    """Prints the version."""
    console.print_line(f"lora-inference {version('lora-inference')}")


def main() -> None:
    """The entry point `lora-server`."""
    fill_standard_descriptors()
    sys.exit(console.run_command(_command, _tell))


def _command() -> int | None:
    code = app(prog_name="lora-server", standalone_mode=False)
    return code if isinstance(code, int) else None


def _tell(error: Exception) -> int:
    """Tells an error that the commands leave to their caller in one line; raises it again if nobody expects it."""
    usage = console.usage_error(error)
    if usage is not None:
        console.tell_usage(error, usage)
        return 2
    if isinstance(error, OSError):
        console.tell(f"error: {console.os_error_text(error)}")
        return 1
    raise error

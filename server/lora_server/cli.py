"""The command `lora-server`: serves, checks its configuration, probes health, makes tokens. Holds no logic."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from lora_server.config import RpcConfig, ServerConfig
from lora_server.flags import with_settings
from lora_server.inspect_command import inspect_command
from lora_server.settings import Resolved, as_toml
from lora_server.telemetry import configure_logging
from lora_server.types import DEFAULT_TENANT

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves one diffusion model with thousands of LoRA adapters over gRPC.",
)
tokens_app = typer.Typer(no_args_is_help=True, help="Bearer tokens.")
app.add_typer(tokens_app, name="token")

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
        sys.stdout.write(as_toml(resolved))
        return
    from lora_server.preflight import faults

    config = resolved.config
    if not _told(faults(config)):
        raise typer.Exit(2)
    configure_logging(config.log.level, config.log.format)
    raise typer.Exit(_run(config))


@app.command("check-config")
@with_settings
def check_config(resolved: Resolved, print_config: bool) -> None:
    """Checks what `serve` would take, paths, certificates and tokens included, and starts nothing.

    Exit codes: 0 if a server can start with it, 2 with a line a fault on standard error.
    """
    from lora_server.preflight import content_faults, faults, network_faults, notes

    if print_config:
        sys.stdout.write(as_toml(resolved))
    config = resolved.config
    if not _told([*(faults(config) or content_faults(config)), *network_faults(config)]):
        raise typer.Exit(2)
    for note in notes(config):
        sys.stderr.write(f"note: {note}\n")
    if not print_config:
        sys.stdout.write("the configuration is valid\n")


def _told(faults: Sequence[str]) -> bool:
    """Writes faults down; returns whether there are none."""
    for fault in faults:
        sys.stderr.write(f"error: {fault}\n")
    return not faults


@app.command()
def health(
    address: Annotated[
        str, typer.Option(help="HOST:PORT or unix:PATH; what a server listens on.", envvar="LORA_SERVER_RPC_LISTEN")
    ] = RpcConfig().listen,
    service: Annotated[str, typer.Option(help="Full name of a service; default: the whole server.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to connect, and to get an answer.", min=0.001)] = 5.0,
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
    from lora_server.rpc.probe import BAD_USAGE, SERVING, Probe, reachable

    try:
        ca, key, certificate = (path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_cert))
    except OSError as error:
        sys.stderr.write(f"error: cannot read {str(error.filename)!r}: {error.strerror}\n")
        raise typer.Exit(BAD_USAGE) from None
    if (key is None) != (certificate is None):
        sys.stderr.write("error: --tls-cert and --tls-key belong together\n")
        raise typer.Exit(BAD_USAGE)
    use_tls = tls or ca is not None or key is not None
    probe = Probe(reachable(address), service, timeout, use_tls, ca, key, certificate, tls_server_name)
    code, text = probe.ask()
    (sys.stdout if code == SERVING else sys.stderr).write(f"{text}\n")
    raise typer.Exit(code)


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
        sys.stderr.write(f"error: the token {error}\n")
        raise typer.Exit(2) from None
    sys.stdout.write(f"{token}\n{line}\n")


def _run(config: ServerConfig) -> int:
    """Runs the server; an error at start is one line on standard error, and exit code 1."""
    from lora_server.app import Server
    from lora_server.errors import LoraServerError
    from lora_server.models.registry import ModelLoadError
    from lora_server.monitoring.tracing import OtelMissingError

    def on_serving(address: str) -> None:
        sys.stdout.write(f"lora-server serves {config.model.model} on {address}\n")
        sys.stdout.flush()

    async def run() -> int:
        return await Server(config).run(on_serving)

    try:
        return asyncio.run(run())
    except (OSError, ValueError, OtelMissingError, ModelLoadError, LoraServerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


app.command("inspect")(inspect_command)


@app.command("version")
def show_version() -> None:
    """Prints the version."""
    sys.stdout.write(f"lora-inference {version('lora-inference')}\n")


def main() -> None:
    """The entry point `lora-server`."""
    app()

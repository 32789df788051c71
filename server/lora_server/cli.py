"""The command `lora-server`: serves, checks its configuration, probes health, makes tokens. Holds no logic."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version

import typer

from lora_server.config import ServerConfig
from lora_server.flags import with_settings
from lora_server.settings import Resolved, as_toml
from lora_server.telemetry import configure_logging

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves one diffusion model with thousands of LoRA adapters over gRPC.",
)


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
    config = resolved.config
    configure_logging(config.log.level, config.log.format)
    raise typer.Exit(_run(config))


def _run(config: ServerConfig) -> int:
    """Runs the server; an error at start is one line on standard error, and exit code 1."""
    from lora_server.app import Server
    from lora_server.errors import LoraServerError
    from lora_server.models.registry import ModelLoadError

    def on_serving(address: str) -> None:
        sys.stdout.write(f"lora-server serves {config.model.model} on {address}\n")
        sys.stdout.flush()

    async def run() -> int:
        return await Server(config).run(on_serving)

    try:
        return asyncio.run(run())
    except (OSError, ModelLoadError, LoraServerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


@app.command("version")
def show_version() -> None:
    """Prints the version."""
    sys.stdout.write(f"lora-inference {version('lora-inference')}\n")


def main() -> None:
    """The entry point `lora-server`."""
    app()

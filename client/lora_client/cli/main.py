"""The command `lora-client`: makes images, manages adapters, asks the server. Human output by default, `--json` else.

Exit codes: 0 ok, 1 other failure, 2 wrong usage or invalid request, 3 not found, 4 unavailable or out of time,
5 refused (forbidden, conflict, precondition), 6 exhausted (queue, cache, memory), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lora_client.cli import adapters, generate, server, show, top
from lora_client.cli.common import Connection, exit_code, normalise_options, print_error
from lora_client.errors import LoraClientError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Makes images on a LoRA diffusion service, each with the adapters it names.\n\n"
        "Exit codes: 0 ok, 1 failure, 2 invalid request, 3 not found, 4 unavailable, 5 refused, 6 exhausted, "
        "130 interrupted.\n\nA bearer token is taken from the environment, LORA_TOKEN; it is sent over TLS, "
        "loopback and Unix sockets only."
    ),
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("show")(show.show)
app.command("info")(server.info)
app.command("health")(server.health)
app.command("top")(top.top)
app.add_typer(adapters.app, name="adapters")


@app.callback()
def _connect(
    context: typer.Context,
    server: Annotated[str, typer.Option(help="HOST:PORT or unix:PATH.", envvar="LORA_SERVER")] = "127.0.0.1:50051",
    timeout: Annotated[float | None, typer.Option(help="Seconds a call may take; default: no bound.")] = None,
    tls_ca: Annotated[str | None, typer.Option(help="Connects by TLS and trusts this PEM file.")] = None,
    tls_cert: Annotated[str | None, typer.Option(help="The client's certificate, for mutual TLS.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="The client's private key, for mutual TLS.")] = None,
) -> None:
    context.obj = Connection(server, timeout, tls_ca, tls_cert, tls_key, os.environ.get("LORA_TOKEN"))


def main() -> None:
    """The entry point `lora-client`."""
    arguments = normalise_options(sys.argv[1:])
    try:
        app(args=arguments, prog_name="lora-client")
    except LoraClientError as error:
        print_error(error)
        sys.exit(exit_code(error))
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)

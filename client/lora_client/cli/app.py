"""The commands of `lora-client`, and the options that all of them share."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from lora_client.addresses import DEFAULT_SERVER
from lora_client.cli import adapters, generate, server, show, top
from lora_client.cli.common import Connection

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    help=(
        "Makes images on a LoRA diffusion service, each with the adapters it names.\n\n"
        "Exit codes: 0 ok, 1 failure, 2 invalid request, 3 not found, 4 unavailable, 5 refused, 6 exhausted, "
        "130 interrupted.\n\nA bearer token is taken from the environment, LORA_TOKEN; it is sent over TLS, "
        "loopback and Unix sockets only. The options here may also stand behind a command. LORA_DEBUG=1 shows "
        "the traceback of an unexpected error."
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
    server: Annotated[str, typer.Option(help="HOST[:PORT] or unix:PATH.", envvar="LORA_SERVER")] = DEFAULT_SERVER,
    timeout: Annotated[float | None, typer.Option(help="Seconds a call may take; default: no bound.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Connects by TLS and trusts the system's roots.")] = False,
    tls_ca: Annotated[str | None, typer.Option(help="Connects by TLS and trusts this PEM file.")] = None,
    tls_cert: Annotated[str | None, typer.Option(help="The client's certificate, for mutual TLS.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="The client's private key, for mutual TLS.")] = None,
    tls_server_name: Annotated[str | None, typer.Option(help="The name in the server's certificate.")] = None,
) -> None:
    context.obj = Connection(
        server, timeout, tls_ca, tls_cert, tls_key, os.environ.get("LORA_TOKEN"), tls, tls_server_name
    )


def run(arguments: Sequence[str]) -> int | None:
    """Runs the command that *arguments* name; returns its exit code, None for 0. Raises what the command does."""
    code = command().main(args=list(arguments), prog_name="lora-client", standalone_mode=False)
    return code if isinstance(code, int) else None


def command() -> Any:
    """Returns the parser; every command takes the shared options too, so that they may stand behind it.

    Nothing is moved: an argument is an option only where the parser expects one, never as the value of another.
    """
    root: Any = typer.main.get_command(app)
    shared = [option for option in root.params if option.name in Connection.OPTIONS]
    for each in _commands(root):
        each.params += [_behind(option) for option in shared]
    return root


def _commands(group: Any) -> Iterator[Any]:
    for each in group.commands.values():
        yield each
        if hasattr(each, "commands"):
            yield from _commands(each)


def _behind(option: Any) -> Any:
    """A copy of a shared option for a command: hidden in its help, without a default, over what stands before."""

    def override(context: typer.Context, parameter: Any, value: Any) -> None:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            context.obj = replace(context.obj, **{Connection.OPTIONS[parameter.name]: value})

    behind = copy.copy(option)
    behind.default, behind.envvar, behind.hidden, behind.expose_value = None, None, True, False
    behind.callback = override
    return behind

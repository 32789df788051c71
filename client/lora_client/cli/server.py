"""`lora-client info` and `lora-client health`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_client.cli.common import Connection, print_json
from lora_client.console import print_line
from lora_client.errors import LoraClientError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def info(context: typer.Context, json: Json = False) -> None:
    """Says what the server serves, allows and holds."""
    connection: Connection = context.obj
    with connection.open() as client:
        server = client.server_info()
    if json:
        print_json(server)
        return
    print_line(f"lora-inference {server.version}, serving since {server.start_time:%Y-%m-%d %H:%M:%S} UTC")
    for title, section in (
        ("model", server.model),
        ("limits", server.limits),
        ("cache", server.cache),
        ("queue", server.queue),
        ("engine", server.engine),
    ):
        print_line("")
        print_line(title)
        for key, value in section.items():
            if isinstance(value, dict):
                value = ", ".join(f"{name} {item}" for name, item in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            print_line(f"  {key:<26} {value}")


def health(
    context: typer.Context,
    service: Annotated[str, typer.Option(help="Full name of a service; default: the whole server.")] = "",
) -> None:
    """Prints SERVING and exits with 0, or NOT_SERVING and 4."""
    connection: Connection = context.obj
    with connection.open() as client:
        try:
            serving = client.health(service)
        except LoraClientError as error:
            if error.code != "NOT_FOUND":
                raise
            raise LoraClientError(f"the server has no service {service!r}", code=error.code) from None
    print_line("SERVING" if serving else "NOT_SERVING")
    raise typer.Exit(0 if serving else 4)

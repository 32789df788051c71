"""`lora-client show`: the provenance inside a file, and the command line that makes the picture again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_client.cli.common import print_json
from lora_client.cli.progress import truncation_text
from lora_client.cli.provenance import read_provenance
from lora_client.cli.remake import arguments, command_line, use_text, uses
from lora_client.console import json_text, print_line
from lora_client.types import PromptTruncation

__all__ = ["command_line", "read_provenance", "show"]


def show(
    file: Annotated[Path, typer.Argument(help="A PNG, WebP or JPEG that the service made.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the command's arguments one by one.")
    ] = False,
) -> None:
    """Prints what made a picture, and the command line that makes it again."""
    provenance = read_provenance(file)
    command = command_line(provenance)
    if as_json:
        print_json({"provenance": provenance, "command": command, "arguments": arguments(provenance)})
        return
    for key, value in provenance.items():
        if key == "prompt_truncations":
            for truncation in _truncations(value):
                print_line(f"{'warning':<20} {truncation_text(truncation)}")
        elif key != "adapters":
            print_line(f"{key:<20} {_text(value)}")
    for use in uses(provenance):
        print_line(f"{'adapter':<20} {use_text(use, trigger=True)}")
    print_line("")
    if command is not None:
        print_line(command)
        return
    print_line("No command line: it would have characters that this terminal obeys, hides or does not have.")
    print_line(f"The arguments of lora-client as JSON: {json_text(arguments(provenance))}")


def _truncations(value: object) -> Iterator[PromptTruncation]:
    """What a file says was cut off its prompts, as far as it has the form; the texts may be left out."""
    for each in value if isinstance(value, list) else []:
        fields = {"dropped_text": "(not in the file)", "negative": False, **(each if isinstance(each, dict) else {})}
        kinds = {"encoder": str, "max_tokens": int, "num_tokens": int, "dropped_text": str, "negative": bool}
        if all(isinstance(fields.get(name), kind) for name, kind in kinds.items()):
            yield PromptTruncation(**{name: fields[name] for name in kinds})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

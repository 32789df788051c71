"""What the commands share: the connection, errors and exit codes, JSON, and the spelling of options."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lora_client._channel import Tls
from lora_client.client import LoraClient
from lora_client.errors import AdapterNotFoundError, LoraClientError

_EXIT_CODES = {
    "INVALID_ARGUMENT": 2,
    "NOT_FOUND": 3,
    "UNAVAILABLE": 4,
    "DEADLINE_EXCEEDED": 4,
    "PERMISSION_DENIED": 5,
    "UNAUTHENTICATED": 5,
    "ALREADY_EXISTS": 5,
    "FAILED_PRECONDITION": 5,
    "RESOURCE_EXHAUSTED": 6,
}
_GLOBAL_OPTIONS = ("--server", "--timeout", "--tls-ca", "--tls-cert", "--tls-key")


@dataclass(frozen=True, slots=True)
class Connection:
    """Where and how to connect."""

    server: str
    timeout_s: float | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token: str | None = field(default=None, repr=False)

    def open(self) -> LoraClient:
        """Makes the client; raises OSError if a certificate file cannot be read."""
        tls = None
        if self.tls_ca or self.tls_cert:
            tls = Tls(_read(self.tls_ca), _read(self.tls_key), _read(self.tls_cert))
        return LoraClient(self.server, tls=tls, token=self.token, timeout_s=self.timeout_s)


def _read(path: str | None) -> bytes | None:
    return Path(path).read_bytes() if path else None


def exit_code(error: LoraClientError) -> int:
    """Returns the exit code of an error, by its canonical code."""
    return _EXIT_CODES.get(error.code, 1)


def print_error(error: Exception) -> None:
    """Prints one line to standard error; never a traceback."""
    reason = getattr(error, "reason", "")
    sys.stderr.write(f"error: {error}{f' ({reason})' if reason else ''}\n")


def print_json(value: object) -> None:
    """Prints a value of the client as JSON."""
    sys.stdout.write(json.dumps(_plain(value), indent=2) + "\n")


def print_line(text: str) -> None:
    """Prints one line to standard output."""
    sys.stdout.write(text + "\n")


def find_ref(client: LoraClient, text: str) -> str | int:
    """Reads NAME or ID: digits alone are an id, unless an adapter has them for a name."""
    if not (text.isascii() and text.isdigit()):
        return text
    try:
        return client.adapters.get(text).name
    except AdapterNotFoundError:
        number = int(text) if len(text) < 20 else 0
        if not 0 < number < 2**63:  # no id
            raise
        return number


def normalise_options(arguments: Sequence[str]) -> list[str]:
    """Takes options in either spelling, `--num_images` for `--num-images`, and global ones in any place.

    Values are left alone, also those that begin with dashes after `=`; what follows `--` is left alone altogether.
    """
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            rest += arguments[index:]
            break
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = name.replace("_", "-") + equals + value
            if name.replace("_", "-") in _GLOBAL_OPTIONS:
                front.append(argument)
                if not equals and index + 1 < len(arguments):
                    index += 1
                    front.append(arguments[index])
                index += 1
                continue
        rest.append(argument)
        index += 1
    return front + rest


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value

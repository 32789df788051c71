"""What the commands share: the connection, JSON of the client's values, and references to adapters."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar

from lora_client import console
from lora_client._channel import Tls
from lora_client._retry import RetryPolicy
from lora_client.addresses import target
from lora_client.cli.diagnosis import cause_of
from lora_client.client import LoraClient
from lora_client.errors import AdapterNotFoundError, DeadlineExceededError, LoraClientError, UnavailableError

_MAX_PEM_BYTES = 1024 * 1024
_MAX_DIGITS = 40


@dataclass(frozen=True, slots=True)
class Connection:
    """Where and how to connect."""

    server: str
    timeout_s: float | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_server_name: str | None = None

    OPTIONS: ClassVar[dict[str, str]] = {
        "server": "server",
        "timeout": "timeout_s",
        "tls": "tls",
        "tls_ca": "tls_ca",
        "tls_cert": "tls_cert",
        "tls_key": "tls_key",
        "tls_server_name": "tls_server_name",
    }
    """The options of the command line, and the fields that they set."""

    @contextmanager
    def open(self, retry: RetryPolicy = RetryPolicy()) -> Iterator[LoraClient]:  # noqa: B008 - frozen
        """Makes the client for a `with` block; what fails to connect inside it is told with its cause.

        Raises:
            OSError: If a certificate file cannot be read.
            ValueError: If it holds none, or the options do not belong together.
        """
        tls = self._tls()
        with LoraClient(self.server, tls=tls, token=self.token, timeout_s=self.timeout_s, retry=retry) as client:
            try:
                yield client
            except (UnavailableError, DeadlineExceededError) as error:
                if error.reason:
                    raise
                raise type(error)(self._cause(error, tls), code=error.code) from None

    def _cause(self, error: LoraClientError, tls: Tls | None) -> str:
        address = target(self.server)
        cause = cause_of(address, tls)
        if cause is None and isinstance(error, DeadlineExceededError):
            return f"{address} did not finish within the {self.timeout_s:g} s of --timeout"
        return cause or f"no answer from {address}: {error}"

    def _tls(self) -> Tls | None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together")
        if not (self.tls or self.tls_ca or self.tls_cert):
            if self.tls_server_name:
                raise ValueError("--tls-server-name is of a TLS connection; give --tls or --tls-ca too")
            return None
        ca, key, cert = (
            _read_pem(option, path)
            for option, path in (("--tls-ca", self.tls_ca), ("--tls-key", self.tls_key), ("--tls-cert", self.tls_cert))
        )
        if self.tls_cert and self.tls_key:
            _check_pair(self.tls_cert, self.tls_key)
        return Tls(ca, key, cert, self.tls_server_name)


def _check_pair(certificate: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        text = f"{key!r} is not the private key, without a password, of {certificate!r}"
        raise ValueError(f"--tls-key: {text}") from error


def _read_pem(option: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        data = file.read(_MAX_PEM_BYTES + 1)
    if b"-----BEGIN " not in data or len(data) > _MAX_PEM_BYTES:
        raise ValueError(f"{option}: {path!r} is no PEM file (it has no line such as -----BEGIN CERTIFICATE-----)")
    return data


def print_json(value: object) -> None:
    """Prints a value of the client as JSON."""
    console.print_json(_plain(value))


def find_ref(client: LoraClient, text: str) -> str | int:
    """Reads NAME or ID: digits alone are an id, unless an adapter has them for a name; asks the server for that."""
    if not (text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS):
        return text
    try:
        return client.adapters.get(text).name
    except AdapterNotFoundError:
        return int(text)


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

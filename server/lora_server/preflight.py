"""What is checked before a start, beyond the values: paths, addresses, certificates, tokens.

Listens nowhere and loads no model, but looks at its names and headers. Whether a port is taken is not said: that may be
by the server that runs now.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_server.adapters.naming import NAME_RULE, is_valid_name
from lora_server.config import ModelConfig, Preload, ServerConfig
from lora_server.models.registry import DEMO_MODEL, check_files
from lora_server.models.single_file import is_single_file
from lora_server.rpc.listen import socket_path
from lora_server.security.certificates import read_certificates
from lora_server.security.tokens import check_tenant, read_tokens

_MAX_PORT = 65535
_MAX_SOCKET_PATH_BYTES = 107
"""Of a Unix socket's path: what `sockaddr_un` has room for."""


def faults(config: ServerConfig) -> list[str]:
    """Returns a sentence for everything that no restart would mend; reads files, changes nothing."""
    token_file = config.auth.token_file
    return [
        *_model_faults(config.model),
        *(fault for root in config.adapter_roots for fault in _folder_faults("adapter_roots", root)),
        *(fault for preload in config.preloads for fault in _preload_faults(preload)),
        *_listen_faults(config),
        *(_trying("tls", lambda: read_certificates(config.tls)) if config.tls.enabled else ()),
        *(_trying("auth.token_file", lambda: read_tokens(token_file)) if token_file else ()),
    ]


def network_faults(config: ServerConfig) -> list[str]:
    """Returns a sentence for every address that this machine cannot listen on now.

    That may pass (a name server or an interface that is not up yet), so `serve` leaves it to the attempt.
    """
    listen, metrics = config.rpc.listen, config.telemetry.metrics_listen
    found = [] if listen.startswith("unix:") else [*_address_faults("rpc.listen", listen)]
    return found if metrics is None else [*found, *_address_faults("telemetry.metrics_listen", metrics)]


def content_faults(config: ServerConfig) -> list[str]:
    """Returns a sentence if names and headers of a local model tell that it cannot be served.

    `serve` leaves it to the loading, which looks at more.
    """
    return [*_trying("model.model", lambda: check_files(config.model))]


def notes(config: ServerConfig) -> list[str]:
    """Returns what could not be checked here."""
    if _is_hub_id(config.model.model):
        return [f"model.model: {config.model.model!r} is taken for a hub id; whether it exists is not checked"]
    return []


def _is_hub_id(model: str) -> bool:
    looks_like_a_path = model.startswith(("/", ".", "~")) or is_single_file(model)
    return model != DEMO_MODEL and not looks_like_a_path and not Path(model).exists() and model.count("/") == 1


def _model_faults(config: ModelConfig) -> Iterator[str]:
    path = Path(config.model)
    if config.model != DEMO_MODEL and not _is_hub_id(config.model) and not path.exists():
        yield f"model.model: {config.model!r} is neither 'demo', a hub id (OWNER/NAME), nor a path that exists"
    elif path.is_dir() and config.model != DEMO_MODEL and not (path / "model_index.json").is_file():
        yield f"model.model: the folder {config.model!r} has no model_index.json, so it is no pipeline of diffusers"
    if config.config_folder is not None:
        yield from _folder_faults("model.config_folder", config.config_folder)


def _folder_faults(setting: str, folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{setting}: {str(folder)!r} is no folder"
    elif not os.access(folder, os.R_OK | os.X_OK):
        yield f"{setting}: the folder {str(folder)!r} cannot be read"


def _preload_faults(preload: Preload) -> Iterator[str]:
    if preload.name is not None and not is_valid_name(preload.name):
        yield f"preloads: the name {preload.name!r} of {preload.path!r} {NAME_RULE}"
    if not os.access(preload.path, os.R_OK):
        yield f"preloads: {preload.path!r} does not exist or cannot be read"
    for tenant in preload.tenants or ():
        yield from _trying(f"preloads: {preload.path!r}", lambda tenant=tenant: check_tenant(tenant))  # type: ignore[misc]


def _listen_faults(config: ServerConfig) -> Iterator[str]:
    listen, metrics = config.rpc.listen, config.telemetry.metrics_listen
    yield from _socket_faults(listen) if listen.startswith("unix:") else _port_faults("rpc.listen", listen)
    if metrics is None:
        return
    yield from _port_faults("telemetry.metrics_listen", metrics)
    if not listen.startswith("unix:") and _collide(_host_and_port(listen), _host_and_port(metrics)):
        yield f"telemetry.metrics_listen: {metrics!r} is taken by rpc.listen; give metrics a port of their own"


def _socket_faults(listen: str) -> Iterator[str]:
    path = socket_path(listen)
    folder = path.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield f"rpc.listen: no socket can be made in {str(folder)!r}"
    elif len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        yield f"rpc.listen: the path of a socket has at most {_MAX_SOCKET_PATH_BYTES} bytes, and {str(path)!r} has more"
    elif path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        yield f"rpc.listen: {str(path)!r} is there and is no socket"


def _port_faults(setting: str, listen: str) -> Iterator[str]:
    if _host_and_port(listen)[1] > _MAX_PORT:
        yield f"{setting}: {listen!r} has no port; ports are 0 to {_MAX_PORT}"


def _address_faults(setting: str, listen: str) -> Iterator[str]:
    """Says why no server can have this address now: it is none, not this machine's, or not for this user."""
    host, port = _host_and_port(listen)
    if port > _MAX_PORT:
        return  # said already
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        yield f"{setting}: {host!r} in {listen!r} is neither an address nor a name that is known here"
        return
    refused = [_bind_error(family, address) for family, *_, address in found]
    if all(refused):  # a name may have an address that this machine has not, beside one that it has
        yield f"{setting}: this machine cannot listen on {listen!r}: {refused[0]}"


def _bind_error(family: int, address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> str:
    """Binds without listening, so that nobody can connect; empty if that works, or would if the port were free."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:  # of socket() too: a kernel without IPv6
        return "" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ""


def _host_and_port(listen: str) -> tuple[str, int]:
    """Splits HOST:PORT or [IPV6]:PORT; no host is every address, as `monitoring.exporter` takes it."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]") or "0.0.0.0", int(port)


def _collide(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two addresses cannot both be listened on, as far as their texts tell; port 0 is any that is free."""
    (host, port), (other_host, other_port) = one, other
    every = {"0.0.0.0", "::"}
    one_kind = (":" in host) == (":" in other_host) or "::" in {host, other_host}  # :: takes IPv4 as well
    return port == other_port != 0 and (host == other_host or (one_kind and bool(every & {host, other_host})))


def _trying(setting: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except OSError as error:
        yield f"{setting}: cannot read {str(error.filename)!r}: {error.strerror}"
    except ValueError as error:
        yield f"{setting}: {error}"

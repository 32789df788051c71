"""Where a server listens, and how: plain text or TLS, a port or a Unix socket, and what the log says about it."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from lora_server.config import ServerConfig, TlsConfig, is_local
from lora_server.security.certificates import Certificates, certificate_files, read_certificates
from lora_server.security.watched import Watched

_log = structlog.get_logger(__name__)


def bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Binds *server* as configured; returns its address, HOST:PORT with the true port, or unix:PATH.

    Raises:
        OSError: If the address cannot be bound, or a certificate file not read.
        ValueError: If the certificates cannot be used.
    """
    address = config.rpc.listen
    if address.startswith("unix:"):
        claim_socket(socket_path(address))
    try:
        if config.tls.enabled:
            port = server.add_secure_port(address, server_credentials(config.tls))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the address is in use or not available") from error
    _warn(config)
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _warn(config: ServerConfig) -> None:
    if is_local(config.rpc.listen):
        return
    if not config.tls.enabled:
        _log.warning(
            "INSECURE: plain text where others can reach it; prompts, pictures and tokens can be read on the way",
            listen=config.rpc.listen,
        )
    if config.auth.token_file is None:
        _log.warning(
            "OPEN: no token file; everybody who reaches the address may use and manage everything",
            listen=config.rpc.listen,
        )


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """Returns credentials that take each new connection's certificates from the files as they are then.

    Connections that stand are left alone. Files that cannot be used (one of a pair is written yet, say) change nothing.
    """
    watched = Watched("certificates", certificate_files(config), lambda: read_certificates(config))
    served = watched.get()

    def changed() -> Any:
        nonlocal served
        latest = watched.get()
        if latest is served:
            return None
        served = latest
        return _configuration(latest)

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        _configuration(served), changed, require_client_authentication=config.client_ca is not None
    )
    return credentials


def _configuration(certificates: Certificates) -> Any:
    pair = (certificates.private_key, certificates.certificate)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=certificates.client_ca)


def socket_path(address: str) -> Path:
    """Returns the path of `unix:PATH` or `unix:///PATH`."""
    path = address.removeprefix("unix:")
    return Path(path.removeprefix("//") if path.startswith("///") else path)


def claim_socket(path: Path) -> None:
    """Makes sure that no server listens on *path*: gRPC would take the socket away from it without a word.

    Raises:
        OSError: If a server does, or something else than a socket is there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(f"cannot listen on unix:{path}: a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # left behind by a server that was killed
            return
    raise OSError(f"cannot listen on unix:{path}: another server does")

"""Why a server cannot be reached, found out by a connection of its own: gRPC names neither the cause nor a way out."""

from __future__ import annotations

import os
import socket
import ssl

from lora_client._channel import Tls
from lora_client.addresses import hosts_and_ports, proxy_options

_TIMEOUT_S = 2.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


def cause_of(address: str, tls: Tls | None) -> str | None:
    """Returns why *address* cannot be reached, in one sentence; None if it can, or if nothing is known.

    Blocks for seconds at most. What is reached through a proxy is not asked past it.
    """
    if not proxy_options(address) and any(map(os.environ.get, _PROXIES)):
        return None
    try:
        with _connected(address) as connection:
            return _of_plain(address, connection) if tls is None else _of_tls(address, connection, tls)
    except (ConnectionRefusedError, FileNotFoundError):
        return (
            f"nothing listens on {address}; start a server there with `lora-server serve --listen {address}`, "
            "or name another with --server"
        )
    except socket.gaierror:
        return f"the host of {address} is unknown; name the server with --server HOST:PORT"
    except OSError as error:
        return f"cannot connect to {address}: {error.strerror or error}"
    except ValueError:
        return None


def _connected(address: str) -> socket.socket:
    if address.startswith(("unix:", "unix-abstract:")):
        kind, _, path = address.partition(":")
        path = path.removeprefix("//") if path.startswith("///") else path
        return _connected_socket("\0" + path if kind == "unix-abstract" else path)
    places = hosts_and_ports(address)
    if not places:
        raise ValueError("a scheme that only gRPC resolves")
    return socket.create_connection(places[0], timeout=_TIMEOUT_S)


def _connected_socket(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _of_plain(address: str, connection: socket.socket) -> str | None:
    """Whether the server speaks TLS, where the caller did not."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _shake_hands(context, connection, None)
    except OSError:
        return None
    return f"the server on {address} speaks TLS; give --tls-ca FILE, or --tls if its certificate is a public one"


def _of_tls(address: str, connection: socket.socket, tls: Tls) -> str | None:
    """What is wrong with the certificate, or that the server speaks no TLS."""
    roots = tls.root_certificates
    try:
        context = ssl.create_default_context(cadata=roots.decode("ascii", "replace") if roots else None)
        _shake_hands(context, connection, tls.server_name or hosts_and_ports(address)[0][0])
    except ssl.SSLCertVerificationError as error:
        text = error.verify_message.rstrip(".")
        way = "give its authority's file with --tls-ca"
        if "match" in text:
            way = "give the name in it with --tls-server-name"
        return f"the certificate of {address} is not trusted ({text}); {way}"
    except (ssl.SSLError, ConnectionError, TimeoutError):
        return f"the server on {address} does not speak TLS as asked; leave out --tls and --tls-ca if it is a plain one"
    except ValueError:
        return "the certificates of --tls-ca cannot be read"
    return None


def _shake_hands(context: ssl.SSLContext, connection: socket.socket, name: str | None) -> None:
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(connection, server_hostname=name):
        pass

"""Addresses of servers as people write them: what gRPC is to dial, and whether it is on this machine."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from contextlib import suppress
from urllib.parse import unquote

DEFAULT_PORT = 50051
DEFAULT_SERVER = f"127.0.0.1:{DEFAULT_PORT}"
_SOCKETS = ("unix:", "unix-abstract:")
_RESOLVED = re.compile(r"(?:dns|ipv4|ipv6):(?://[^/]*/)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_OTHER_SCHEMES = ("xds:", "vsock:", "google-c2p:")
_BRACKETED = re.compile(r"\[([^\[\]]+)\](?::(.*))?")
_NUMBERS = re.compile(r"[0-9][0-9a-fxA-FX.]*")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that gRPC reads; it knows neither `all_proxy` nor upper case."""


def target(server: str) -> str:
    """Returns *server* as gRPC dials it: port 50051 where HOST:PORT has no port, and IPv6 in brackets.

    Unix sockets, and the schemes of gRPC that do not end in a host and a port, stay as they are.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is no address.
    """
    if not isinstance(server, str):
        raise TypeError(f"the server's address is text such as {DEFAULT_SERVER}, not {type(server).__name__}")
    if server.startswith((*_SOCKETS, *_OTHER_SCHEMES)) and server.isprintable():
        return server
    prefix, endpoints = _endpoints(server)
    if not prefix and _URL.match(server):
        raise ValueError(f"the server's address {server!r} is a URL; write HOST:PORT, such as {DEFAULT_SERVER}")
    if not server or not server.isprintable() or " " in server:
        raise ValueError(f"the server's address {server!r} is neither HOST:PORT nor unix:PATH")
    return prefix + ",".join(_with_port(*_host_and_port(endpoint)) for endpoint in endpoints)


def is_local(server: str) -> bool:
    """Whether *server* is surely on this machine: a Unix socket, loopback by number in any spelling, or localhost.

    Looks nothing up, so that it can decide what may be sent in plain text.
    """
    if server.startswith(_SOCKETS):
        return True
    return all(_is_loopback(host) for host in _hosts(server))


def is_here(server: str) -> bool:
    """Whether *server* is on this machine, also by a name of its own that resolves to loopback; may look up a name."""
    return is_local(server) or all(_is_loopback(host) or _resolves_here(host) for host in _hosts(server))


def proxy_options(server: str) -> list[tuple[str, int | str]]:
    """Returns the channel options for *server* about proxies: what is on this machine goes through none.

    A remote address is left to gRPC, which reads the proxy from the environment and obeys `no_proxy`. Names are looked
    up only where the environment has a proxy.
    """
    has_proxy = any(os.environ.get(name) for name in _PROXIES)
    here = is_here(server) if has_proxy else is_local(server)
    return [("grpc.enable_http_proxy", 0)] if here else []


def hosts_and_ports(server: str) -> list[tuple[str, int]]:
    """Returns the hosts and ports of an address made by `target`; none for sockets and other schemes."""
    if server.startswith((*_SOCKETS, *_OTHER_SCHEMES)):
        return []
    pairs = [_host_and_port(endpoint) for endpoint in _endpoints(server)[1]]
    return [(host, int(port or DEFAULT_PORT)) for host, port in pairs]


def _hosts(server: str) -> list[str]:
    """The hosts of an address; one that is nobody's where it cannot be read."""
    try:
        return [host for host, _ in map(_host_and_port, _endpoints(server)[1])]
    except ValueError:
        return [""]


def _endpoints(server: str) -> tuple[str, list[str]]:
    """The scheme with its slashes, if there is one, and the parts after it."""
    scheme = _RESOLVED.match(server)
    if scheme is None:
        return "", [server]
    return scheme[0], unquote(server[scheme.end() :]).split(",")


def _host_and_port(endpoint: str) -> tuple[str, str | None]:
    bracketed = _BRACKETED.fullmatch(endpoint)
    if bracketed is not None:
        host, port = bracketed[1], bracketed[2]
    elif endpoint.count(":") > 1:
        host, port = endpoint, None
    else:
        host, colon, text = endpoint.partition(":")
        port = text if colon else None
    if (bracketed is not None or ":" in host) and not _is_ipv6(host):
        raise ValueError(f"the server's address {endpoint!r} is neither HOST:PORT nor [IPV6]:PORT")
    if not host:
        raise ValueError(f"the server's address {endpoint!r} names no host; write {DEFAULT_SERVER}")
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ValueError(f"the port of the server's address {endpoint!r} is not a number from 1 to 65535")
    return host, port


def _with_port(host: str, port: str | None) -> str:
    if host.lower() == "localhost.":  # a host's own table has it without the dot
        host = "localhost"
    elif _NUMBERS.fullmatch(host):  # gRPC reads four decimals only
        with suppress(OSError):
            host = socket.inet_ntoa(socket.inet_aton(host))
    return f"{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    name = host.partition("%")[0].rstrip(".").lower()
    if name == "localhost":
        return True
    try:
        # inet_aton reads what resolvers read beside four decimals: 127.1, 0x7f.1, 2130706433.
        address = ipaddress.ip_address(socket.inet_aton(name) if _NUMBERS.fullmatch(name) else name)
    except (ValueError, OSError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified  # a connection to 0.0.0.0 is one to this machine


def _resolves_here(host: str) -> bool:
    """Whether a name that may be this machine's resolves to loopback only; a name with dots is looked up only then."""
    name = host.rstrip(".").lower()
    machine = socket.gethostname().lower().partition(".")[0]
    own = "." not in name or name.startswith(f"{machine}.") or name.endswith((".localhost", ".localdomain"))
    if not name or ":" in name or not own:
        return False
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return False
    return all(map(_is_loopback, found))

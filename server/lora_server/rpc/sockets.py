"""The connections of this process as the operating system has them: who is at the other end, and how to end one.

gRPC for Python neither tells which connections it has nor closes one. A socket can be shut down through a duplicate of
its descriptor, though, and gRPC then sees that its peer has gone. Nothing here touches what is sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

Peer = tuple[str, int]
"""Address and port of the other end."""

_DESCRIPTORS = "/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd"
_MAX_DESCRIPTORS = 65_536


def peer_of(text: str) -> Peer | None:
    """Returns the peer that gRPC calls *text*, such as `ipv4:127.0.0.1:1234`; None on a Unix socket."""
    kind, _, rest = unquote(text).partition(":")
    host, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return _address(host.strip("[]")), int(port)


def connections(port: int) -> dict[Peer, int]:
    """Returns the descriptors of the connections to *port* of this machine that the process holds, by peer."""
    found = {}
    for name in os.listdir(_DESCRIPTORS):
        with _borrowed(int(name)) as connection:
            peer = _peer(connection, port)
            if peer is not None:
                found[peer] = int(name)
    return found


def shut(peer: Peer, descriptor: int, port: int) -> bool:
    """Ends the connection of *peer*, if *descriptor* still is that; returns whether it was."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return False
    with contextlib.closing(_Duplicate(duplicate)) as own:
        if own.connection is None or _peer(own.connection, port) != peer:
            return False
        with contextlib.suppress(OSError):  # it may have ended by itself
            own.connection.shutdown(socket.SHUT_RDWR)
        return True


def raise_descriptor_limit() -> int:
    """Lets the process have as many descriptors as it may, up to 65,536; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # what a container forbids is no reason not to serve
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


class _Duplicate:
    """A descriptor of our own as a socket, or closed at once if it is none."""

    def __init__(self, descriptor: int) -> None:
        self.connection: socket.socket | None = None
        try:
            self.connection = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)

    def close(self) -> None:
        """Closes it."""
        if self.connection is not None:
            self.connection.close()


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket | None]:
    """A descriptor of somebody else's as a socket, for a look; None if it is none."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        yield None
        return
    try:
        yield connection
    finally:
        connection.detach()


def _peer(connection: socket.socket | None, port: int) -> Peer | None:
    if connection is None:
        return None
    try:
        own = connection.getsockname()  # asking for the family would take longer than all the rest
        if not isinstance(own, tuple) or not isinstance(own[0], str) or own[1] != port:
            return None
        host, peer_port = connection.getpeername()[:2]
    except OSError:  # one that listens, or whose peer has gone
        return None
    return _address(host), int(peer_port)


@lru_cache(maxsize=4096)
def _address(host: str) -> str:
    """One spelling an address; IPv4 within IPv6 is IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)

"""The process's own connections: found by their peer, and ended without touching another's."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from lora_server.rpc import sockets

Pair = tuple[socket.socket, socket.socket, int]


@pytest.fixture(params=["127.0.0.1", "::1", "::"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connection, from the side that came and the side that listened, and the port of the latter."""
    family = socket.AF_INET if "." in request.param else socket.AF_INET6
    with socket.create_server((request.param, 0), family=family, dualstack_ipv6=request.param == "::") as server:
        port = server.getsockname()[1]
        here = socket.create_connection(("127.0.0.1" if request.param == "::" else request.param, port))
        there, _ = server.accept()
        with here, there:
            yield here, there, port


def test_a_connection_is_found_by_its_peer_and_ended(pair: Pair) -> None:
    """The listening socket and connections to other ports are none; an old descriptor ends nobody."""
    here, there, port = pair
    host, own_port = here.getsockname()[:2]
    found = sockets.connections(port)
    assert found == {(host, own_port): there.fileno()}
    assert not sockets.connections(1)
    assert not sockets.shut(("192.0.2.1", 1), there.fileno(), port)
    assert not sockets.shut((host, own_port), 10_000, port)
    assert sockets.shut((host, own_port), there.fileno(), port)
    here.settimeout(5)
    assert here.recv(1) == b""


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:127.0.0.1:1234", ("127.0.0.1", 1234)),
        ("ipv6:%5B::1%5D:1234", ("::1", 1234)),
        ("ipv6:[::1]:1234", ("::1", 1234)),
        ("ipv6:%5B::ffff:127.0.0.1%5D:1234", ("127.0.0.1", 1234)),
        ("unix:", None),
        ("unix:/tmp/x:1", None),
    ],
)
def test_the_names_of_peers(text: str, peer: sockets.Peer | None) -> None:
    """As gRPC gives them; those of Unix sockets have none."""
    assert sockets.peer_of(text) == peer

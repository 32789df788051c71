"""Where a server listens: Unix sockets are nobody else's, and plain text for others is said loudly."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from lora_client import AsyncLoraClient
from lora_server.config import ServerConfig
from lora_server.rpc.probe import reachable
from lora_server.rpc.server import RpcServer
from structlog.testing import capture_logs


def server_on(listen: str, **rpc: object) -> RpcServer:
    """A server that has not loaded its model."""
    return RpcServer(ServerConfig(rpc={"listen": listen, **rpc}))


async def test_a_second_server_does_not_take_the_socket_away(tmp_path: Path) -> None:
    """gRPC alone would; the first goes on answering, and leaves no socket behind."""
    path = tmp_path / "s.sock"
    first = server_on(f"unix:{path}")
    assert await first.start() == f"unix:{path}"
    for spelling in (f"unix:{path}", f"unix://{path}"):
        with pytest.raises(OSError, match="another server does"):
            await server_on(spelling).start()
    async with AsyncLoraClient(f"unix:{path}", timeout_s=5) as client:
        assert not await client.health()
    await first.stop()
    assert not path.exists()


async def test_a_socket_left_behind_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    """A server that was killed cannot clean up; a file of somebody's is not ours to remove."""
    left, file = tmp_path / "left.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    server = server_on(f"unix:{left}")
    await server.start()
    await server.stop()
    file.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        await server_on(f"unix:{file}").start()
    assert file.read_text() == "precious"


@pytest.mark.parametrize(("listen", "loud"), [("127.0.0.1:0", False), ("0.0.0.0:0", True)])
async def test_plain_text_for_others_is_logged_as_insecure_and_open(listen: str, loud: bool) -> None:
    """Two warnings, one for the wire and one for the missing tokens; none on loopback."""
    server = server_on(listen, insecure=True)
    with capture_logs() as logs:
        await server.start()
    await server.stop()
    warnings = [each["event"].partition(":")[0] for each in logs if each["log_level"] == "warning"]
    assert warnings == (["INSECURE", "OPEN"] if loud else [])


def test_the_probe_reaches_a_wildcard_on_its_own_machine() -> None:
    """What listens everywhere is asked on loopback."""
    assert reachable("0.0.0.0:50051") == "127.0.0.1:50051"
    assert reachable("[::]:1") == "[::1]:1"
    assert reachable("unix:/x") == "unix:/x"

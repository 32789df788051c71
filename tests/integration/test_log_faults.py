"""A true server whose log cannot be written: its calls go on, and so does its end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import trustme
from lora_client import GenerationOptions, LoraClient

SERVE = [str(Path(sys.executable).parent / "lora-server"), "serve", "--listen", "127.0.0.1:0", "--warm-size", "64x64"]
QUICK = GenerationOptions(num_inference_steps=2)
F_SETPIPE_SZ = 1031
END_S = 30.0


@contextlib.contextmanager
def served(*options: str, stderr: int | IO[Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address."""
    # Without what the command line's tests leave in this process: their command silences gRPC.
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    process = subprocess.Popen([*SERVE, *options], stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the server did not start"
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait(END_S)
        process.stdout.close()


def stopped(process: subprocess.Popen[str]) -> int:
    """Its exit code after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    return process.wait(END_S)


def use(client: LoraClient, times: int) -> None:
    """Calls that succeed and a call that fails, each of which has a line in the log."""
    for _ in range(times):
        client.adapters.list()
        assert client.health()
    assert client.generate("a star", options=QUICK).images
    with pytest.raises(Exception, match="no-such-adapter"):
        client.adapters.get("no-such-adapter")


def test_a_log_that_nobody_reads_costs_no_call_and_a_closed_one_neither() -> None:
    """First its pipe is full, then its reader is gone, as is that of standard output; the exit code is right."""
    with served("--log-level", "debug", stderr=subprocess.PIPE) as (process, address):
        assert process.stderr is not None
        assert process.stdout is not None
        fcntl.fcntl(process.stderr, F_SETPIPE_SZ, 4096)
        with LoraClient(address, timeout_s=60) as client:
            use(client, times=40)  # more than the pipe holds
            process.stderr.close()
            process.stdout.close()
            use(client, times=3)
        assert stopped(process) == 0


def test_a_full_disk_costs_no_call_and_is_counted(tmp_path: Path) -> None:
    """The metric says how many lines were lost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    with open("/dev/full", "w") as full, served("--metrics-listen", metrics, stderr=full) as (process, address):
        with LoraClient(address, timeout_s=60) as client:
            use(client, times=3)
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
            text = response.read().decode()
        dropped = re.search(r"^lora_log_lines_dropped_total (\S+)$", text, re.MULTILINE)
        assert dropped is not None
        assert float(dropped[1]) >= 3
        assert stopped(process) == 0


def test_lines_of_grpc_follow_the_format_of_the_log(tmp_path: Path) -> None:
    """A probe in plain text to a port with TLS makes gRPC's core write; every line of the log is JSON all the same."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    tls = ("--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "tls.key"))
    log = tmp_path / "log"
    with open(log, "w") as stderr, served(*tls, stderr=stderr) as (process, address):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64))
            with contextlib.suppress(OSError):
                plain.recv(1024)
        assert stopped(process) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("ssl_transport_security" in event.get("place", "") for event in events)


def test_a_server_without_standard_error_serves(tmp_path: Path) -> None:
    """`2>&-`: no socket takes the descriptor's place."""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *SERVE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[-1]
        with LoraClient(address, timeout_s=60) as client:
            use(client, times=1)
        assert stopped(process) == 0
    finally:
        process.kill()
        process.wait(END_S)
        process.stdout.close()

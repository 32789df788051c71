"""Lines that libraries write to standard error by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from lora_server.telemetry.stderr_capture import NativeLine, parse_native_line

GRPC = "E1127 20:01:14.123456   12345 ssl_transport_security.cc:1884] Handshake failed: WRONG_VERSION_NUMBER"
EARLY = "I0000 00:00:1764273674.123456   12345 fork_posix.cc:71] Other threads are running"
TORCH = "[W1127 20:01:14.012345678 Copy.cpp:308] Warning: casting (function operator())"


@pytest.mark.parametrize(
    ("line", "native"),
    [
        (GRPC, NativeLine("error", "Handshake failed: WRONG_VERSION_NUMBER", "ssl_transport_security.cc:1884")),
        (EARLY, NativeLine("info", "Other threads are running", "fork_posix.cc:71")),
        (TORCH, NativeLine("warning", "Warning: casting (function operator())", "Copy.cpp:308")),
        ("terminate called", NativeLine("warning", "terminate called")),
        ("Eating: 1127 apples", NativeLine("warning", "Eating: 1127 apples")),
    ],
)
def test_level_and_place_are_taken_from_a_line(line: str, native: NativeLine) -> None:
    """As far as a line has them."""
    assert parse_native_line(line) == native


SPEAKS = """
import logging, os, sys, threading, warnings
import structlog
from lora_server.telemetry.logs import ProcessLog

log = ProcessLog("info", "json")
os.write(2, b"E1127 20:01:14.1 12 a.cc:3] native \\x1b[31m\\xff\\n")
os.write(2, b"bar 10%\\rbar 100%\\r\\n\\n")
print("python's own", file=sys.stderr)
logging.getLogger("grpc._cython").warning("from %s", "logging")
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
structlog.get_logger().info("ours", value="\\x1b[31m" + "x" * 100_000)
os.write(2, b"unfinished")
log.close()
os.write(2, b"after the end")
"""


def test_every_line_of_the_log_is_json() -> None:
    """Whoever writes it, by whatever way; and standard error is given back at the end."""
    done = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, text=True, check=True, env=os.environ)
    text, end, _ = done.stderr.partition("after the end")
    assert end
    events = [json.loads(line) for line in text.splitlines()]
    said = {event["event"] for event in events}
    assert {"native \x1b[31m\\xff", "bar 10%", "bar 100%", "python's own", "from logging", "ours", "unfinished"} <= said
    assert any("UserWarning: old" in each for each in said)
    assert "ZeroDivisionError: division by zero" in said
    (native,) = (event for event in events if event["event"].startswith("native"))
    assert (native["level"], native["place"]) == ("error", "a.cc:3")
    assert max(map(len, text.splitlines())) < 20_000

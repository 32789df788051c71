"""`lora-client top`: the picture of a terminal, from what the server itself says, and its life on one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from lora_client._results import server_watch
from lora_client.cli.top import table
from lora_client.types import ServerWatch
from lora_server.rpc.backend import Backend
from lora_server.rpc.watching import snapshot
from lora_server.types import AdapterState, Glance, Viewer
from rich.console import Console

from tests.conftest import BIN
from tests.unit.monitoring.house import House


class Adapters(House):
    """A manager that knows one adapter."""

    def glance(self, name: str, viewer: Viewer) -> Glance:
        """It, cached and pinned."""
        return Glance(AdapterState.CACHED, is_pinned=True)


@pytest.fixture
def look() -> ServerWatch:
    """What a client of that house gets, ten seconds after its start."""
    house: Any = Adapters()
    backend = Backend(house, house, "1", time.time() - 10, 60.0, top_adapters=lambda _: [("neon", 3, False)])
    return server_watch(snapshot(backend, 20))


def picture(now: ServerWatch, before: ServerWatch | None) -> list[str]:
    """The lines that a terminal of 160 columns shows."""
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115 - the console's own
    console.print(table(now, before))
    console.file.close()
    return [re.sub(" {2,}", "  ", line.strip()) for line in console.export_text().splitlines()]


def test_the_table_has_queue_rates_caches_and_adapters(look: ServerWatch) -> None:
    """Every counter of the house lies in its own row; at the first look, rates are those since the start."""
    head, *rows = picture(look, None)
    assert re.match(r"demo  up 0:00:10 .* UTC$", head)
    found = dict(row.split("  ", 1) for row in rows if "  " in row)
    assert found["queue"] == "3 of 64 wait, 1 run, 2 tenants, all done in 1.5 s"
    assert found["rate"] == "0.00 images/s, 2.1 image steps/s, 0.00 failures/s"
    assert found["steps/s"] == "base 0.0, merged 0.0, slots 0.7; 0.1 switches/s"
    assert re.match(
        r"\d+ of \d+ adapters, 0 of 0 MiB, hits 48%, 13 evictions, \d+ pins, 1 leases$", found["host cache"]
    )
    assert found["device"] == "2 of 8 slots, hits -, 14 evictions"
    assert found["neon"] == "3  cached  yes"


def test_rates_are_those_since_the_look_before(look: ServerWatch) -> None:
    """Two seconds later, with thirty images and forty image steps more."""
    engine = {**look.engine, "finished_images": 30, "image_steps": int(str(look.engine["image_steps"])) + 40}
    later = replace(look, time=look.time + timedelta(seconds=2), engine=engine)
    assert any("15.00 images/s, 20.0 image steps/s" in line for line in picture(later, look))


def test_a_terminal_shows_it_until_ctrl_c(server_address: str) -> None:
    """The table is drawn again and again in its place; an interrupt ends it with 130, without a traceback."""
    ours, theirs = pty.openpty()
    command = [BIN / "lora-client", "--server", server_address, "top", "--interval", "0.25"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        shown = read_until(ours, lambda text: text.count("host cache") >= 3)
        assert "\x1b[1A" in shown, "it was not drawn in its place"
        process.send_signal(signal.SIGINT)
        rest = read_until(ours, lambda text: False)
        assert process.wait(10) == 130, rest
        assert "Traceback" not in rest
        assert "\x1b[?25h" in rest, "the cursor is hidden still"
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, enough: Any, timeout_s: float = 20.0) -> str:
    """What was shown until it was *enough*, or until nobody writes any more."""
    text, deadline_s = "", time.monotonic() + timeout_s
    while not enough(text):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, f"nothing for {timeout_s} s after {text!r}"
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end was closed
            break
        text += data.decode(errors="replace")
    return text

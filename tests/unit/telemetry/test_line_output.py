"""The log's lines: written in order, never waited for, counted when they are lost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest
from lora_server.telemetry.line_output import LineOutput

SOON_S = 10.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe, reading first; a test may close either."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def read_until_closed(fd: int) -> bytes:
    """Everything, until no writer is left."""
    blocks = []
    while block := os.read(fd, 65536):
        blocks.append(block)
    return b"".join(blocks)


def test_lines_are_written_in_order_and_whole(pipe: tuple[int, int]) -> None:
    """What was queued before the end is there; text that UTF-8 cannot hold is escaped."""
    reading, writing = pipe
    output = LineOutput(writing)
    for k in range(100):
        output.write_line(f"line {k}")
    output.write_line("half \ud800")
    output.close(SOON_S)
    os.close(writing)
    lines = read_until_closed(reading).decode().splitlines()
    assert lines == [*(f"line {k}" for k in range(100)), "half \\ud800"]
    assert output.dropped_lines == 0


def test_a_reader_that_stands_still_costs_lines_and_no_time(pipe: tuple[int, int]) -> None:
    """Nobody waits; what does not fit is counted, said once there is room, and later lines are there."""
    reading, writing = pipe
    told: list[int] = []
    output = LineOutput(writing, on_recovered=told.append, max_pending_bytes=1000)
    began_s = time.monotonic()
    for _ in range(5000):
        output.write_line("x" * 99)
    assert time.monotonic() - began_s < SOON_S
    assert output.dropped_lines > 3000

    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_until_closed(reading)))
    reader.start()
    deadline_s = time.monotonic() + SOON_S
    while not told and time.monotonic() < deadline_s:
        time.sleep(0.01)
    output.write_line("the last")
    output.close(SOON_S)
    os.close(writing)
    reader.join(SOON_S)
    lines = received[0].splitlines()
    assert sum(told) == output.dropped_lines
    assert len(lines) + output.dropped_lines == 5001
    assert lines[-1] == b"the last"


def test_a_reader_that_is_gone_costs_lines(pipe: tuple[int, int]) -> None:
    """A broken pipe is no error for anybody."""
    reading, writing = pipe
    os.close(reading)
    output = LineOutput(writing)
    for _ in range(10):
        output.write_line("nobody reads this")
    output.close(SOON_S)
    assert output.dropped_lines == 10


def test_a_full_disk_costs_lines() -> None:
    """As a broken pipe does."""
    with open("/dev/full", "wb", buffering=0) as full:
        output = LineOutput(full.fileno())
        output.write_line("no room")
        output.close(SOON_S)
        assert output.dropped_lines == 1


def test_the_end_does_not_wait_for_a_reader_that_stands_still(pipe: tuple[int, int]) -> None:
    """A server must be able to stop; lines after the end are dropped."""
    reading, writing = pipe
    output = LineOutput(writing)
    for _ in range(2000):
        output.write_line("x" * 99)
    began_s = time.monotonic()
    output.close(timeout_s=0.05)
    output.write_line("too late")
    assert time.monotonic() - began_s < SOON_S
    assert output.dropped_lines == 1
    reader = threading.Thread(target=lambda: read_until_closed(reading))
    reader.start()
    output.close(SOON_S)  # so that no thread outlives the pipe
    os.close(writing)
    reader.join(SOON_S)


def test_a_descriptor_that_does_not_block_is_waited_for(pipe: tuple[int, int]) -> None:
    """Another process may have made a shared terminal so; no line is lost."""
    reading, writing = pipe
    os.set_blocking(writing, False)
    output = LineOutput(writing)
    for _ in range(2000):
        output.write_line("x" * 99)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_until_closed(reading)))
    reader.start()
    output.close(SOON_S)
    os.close(writing)
    reader.join(SOON_S)
    assert len(received[0].splitlines()) == 2000
    assert output.dropped_lines == 0

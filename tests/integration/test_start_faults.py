"""A true server that does not come to serve: its warm-up fails, or a signal comes first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVE = [str(Path(sys.executable).parent / "lora-server"), "serve", "--listen", "127.0.0.1:0"]
END_S = 60.0

FAILING = """
import sys
from lora_server import cli
from lora_server.engine import engine

def warm_up(*_):
    raise RuntimeError("expected input to have 4 channels, but got 9\\nand more lines")

engine.warm_up = warm_up
cli.main()
"""


def test_a_failed_warm_up_is_one_line_and_never_serves() -> None:
    """The line says what and why; standard output stays empty, and the exit code is 1."""
    command = [sys.executable, "-c", FAILING, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [each for each in done.stderr.splitlines() if "stateless" not in each]
    assert "warm-up failed: RuntimeError: expected input to have 4 channels, but got 9" in line


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.0, 0.7, 2.0])
def test_a_signal_while_the_model_loads_ends_with_0(signum: signal.Signals, after_s: float) -> None:
    """Whatever is under way: imports, the model, its warm-up. The thread that builds cannot be interrupted."""
    process = subprocess.Popen(
        [*SERVE, "--log-level", "debug"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process:
        os.set_blocking(process.stderr.fileno(), True)
        process.stderr.readline()  # its log has begun
        time.sleep(after_s)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=END_S)
        assert process.returncode == 0, stderr
    assert "Traceback" not in stderr

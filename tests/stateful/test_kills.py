"""Kill -9 at any moment: what was acknowledged is there afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_two_hundred_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A process of manager and store dies during loads, pins, uploads and unloads; see `kill_process` for the model."""
    command = [sys.executable, "-m", "tests.stateful.kill_process", tmp_path, "200", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    figures = re.fullmatch(r"200 kills, (\d+) starts, (\d+) acknowledged changes\n", run.stdout)
    assert figures is not None
    assert int(figures[1]) > 20, "most were killed before they had begun"
    assert int(figures[2]) > 20

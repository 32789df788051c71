"""What is said to OpenMP, which reads the environment once, when torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ASK = """
import json, os, sys
import lora_server.cli
from lora_server.threads import let_threads_sleep
early = "torch" not in sys.modules
let_threads_sleep()
print(json.dumps([early, os.environ.get("OMP_WAIT_POLICY")]))
"""


@pytest.mark.parametrize(
    ("said", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "1000"}, None)],
)
def test_idle_threads_sleep_unless_the_environment_says_otherwise(said: dict[str, str], policy: str | None) -> None:
    """And it is said before torch is there."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**plain, **said}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [True, policy]

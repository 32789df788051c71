"""Adapters that the operator names at start."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from lora_client import GenerationOptions, LoraClient
from lora_server.adapters.naming import stable_adapter_id

from tests.conftest import BIN


def test_preloads_are_cached_before_serving_and_change_no_plain_request(demo_adapters: Path) -> None:
    """--lora-path registers under its name and the stable id of its path, with its scale; the base stays the base."""
    path = str(demo_adapters / "a")
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--lora-path", f"brand={path}"]
    server = subprocess.Popen(
        [*command, "--lora-scale", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()[-1]
        with LoraClient(address) as client:
            brand = client.adapters.get(stable_adapter_id(path))
            assert (brand.name, brand.default_scale, brand.current.state) == ("brand", 0.5, "cached")
            quick = GenerationOptions(num_inference_steps=2)
            assert client.generate("a red star", options=quick).stats.way == "base"
            used = client.generate("a red star", adapters=["brand"], options=quick).stats.adapters[0]
            assert (used.adapter.scale, used.load_time_s) == (0.5, 0.0)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=40)
        server.stdout.close()
    assert code == 0

"""Fixtures that several rooms share: adapters for the embedded model, and a true server on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=10_000, deadline=None, print_blob=True)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the server does it; before torch is imported

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def demo_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for the embedded model, written by peft: `a` and `b` for the transformer, `text` for both."""
    from diffusers import StableDiffusion3Pipeline
    from lora_server.demo.paths import model_dir

    from tests.factories import ATTENTION, write_adapter

    root = tmp_path_factory.mktemp("adapters")

    def load() -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline.from_pretrained(model_dir(), use_safetensors=True)

    write_adapter(root / "a", load().transformer, 1, 0.05, target_modules=ATTENTION)
    write_adapter(root / "b", load().transformer, 2, 0.05, target_modules=["ff.net.0.proj"], r=6, use_rslora=True)
    write_adapter(root / "text", load().transformer, 3, 0.05, target_modules=["to_v"])
    write_adapter(root / "text" / "text_encoder", load().text_encoder, 4, 0.2, target_modules=["q_proj", "fc1"])
    return root


@pytest.fixture(scope="session")
def server_address(demo_adapters: Path) -> Iterator[str]:
    """A true `lora-server` with the embedded model, on a free port, for the whole session."""
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--adapter-root", demo_adapters]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the server did not start"
        yield line.split()[-1]
    finally:
        process.terminate()
        code = process.wait(timeout=40)
        assert process.stdout is not None
        process.stdout.close()
        assert code == 0

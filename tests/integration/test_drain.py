"""Unloading an adapter that requests are using, over the wire and with true concurrency."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from lora_client import GenerationOptions, ImageReady, LoraClient, Progress
from lora_client.errors import AdapterInUseError, AdapterNotFoundError

PROMPT = "a red star on a navy background"
STEPS = 40


def used(client: LoraClient) -> int:
    """Bytes that the server's cache holds."""
    return int(str(client.server_info().cache["used_bytes"]))


def test_a_leased_adapter_refuses_to_go_or_is_drained(server_address: str, demo_adapters: Path) -> None:
    """Without drain ADAPTER_IN_USE, at once; with drain the name goes now, the request finishes, then the bytes go."""
    options = GenerationOptions(num_inference_steps=STEPS)
    with LoraClient(server_address, timeout_s=60) as client:
        size_bytes = client.adapters.load(str(demo_adapters / "a"), name="drained").current.size_bytes
        before = client.generate(PROMPT, seed=9, adapters=["drained"], options=options).images[0].data
        used_bytes = used(client)
        running, finished = threading.Event(), threading.Event()
        images: list[bytes] = []

        def generate() -> None:
            for event in client.stream_generate(PROMPT, seed=9, adapters=["drained"], options=options):
                if isinstance(event, Progress):
                    running.set()
                elif isinstance(event, ImageReady):
                    images.append(event.image.data)
            finished.set()

        thread = threading.Thread(target=generate)
        thread.start()
        assert running.wait(30)
        with pytest.raises(AdapterInUseError):
            client.adapters.unload("drained")
        assert client.adapters.unload("drained", drain=True) == 0
        assert not finished.is_set(), "unloading waited for the request; make it longer if it was merely quick"
        with pytest.raises(AdapterNotFoundError):
            client.generate(PROMPT, adapters=["drained"], options=options)
        assert used(client) == used_bytes
        thread.join(60)
        assert images == [before]
        assert used(client) == used_bytes - size_bytes

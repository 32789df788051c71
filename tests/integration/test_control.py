"""Control of where and when adapters act, through a true server, the client and its command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from lora_api.v1 import adapter_service_pb2 as messages
from lora_api.v1 import adapter_service_pb2_grpc
from lora_client import AdapterUse, GenerationOptions, LoraClient
from lora_client.errors import AdapterMalformedError, InvalidRequestError
from PIL import Image as PillowImage

from tests.conftest import BIN

PROMPT = "a red star on a navy background"
QUICK = GenerationOptions(num_inference_steps=4)


@pytest.fixture
def client(server_address: str) -> Iterator[LoraClient]:
    """A client of the session's server, which afterwards knows no more adapters than before."""
    with LoraClient(server_address, timeout_s=60) as client:
        before = {adapter.name for adapter in client.adapters.list()}
        yield client
        for adapter in client.adapters.list():
            if adapter.name not in before:
                client.adapters.unload(adapter.name)


def with_words(folder: Path, target: Path, content: str) -> Path:
    """A copy of an adapter with a `lora_inference.json`."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "lora_inference.json").write_text(content)
    return target


def pixels(data: bytes) -> np.ndarray:
    """The values of an encoded image."""
    return np.asarray(PillowImage.open(io.BytesIO(data)))


def test_the_shown_command_has_every_setting(
    client: LoraClient, server_address: str, demo_adapters: Path, tmp_path: Path
) -> None:
    """A picture with all kinds of settings is made again, byte for byte, by the command that `show` prints."""
    client.adapters.load(str(demo_adapters / "text"), name="control")
    use = AdapterUse.parse("control:0.7,text_encoder=0.5,transformer_blocks.0=0,*.*.attn=1.5,start=0.25,end=0.75")
    result = client.generate(PROMPT, seed=4, adapters=[use], options=QUICK)
    applied = result.images[0].provenance.adapters[0]
    assert (applied.component_scales, applied.block_scales) == (use.component_scales, use.block_scales)
    assert (applied.start, applied.end) == (0.25, 0.75)
    assert result.stats.steps_by_way == {"base": 2, "merged": 2}  # off, on, on, off
    first = result.images[0].save(tmp_path / "first.png")
    shown = subprocess.run([BIN / "lora-client", "show", first], capture_output=True, text=True, check=True)
    command = f"{shown.stdout.splitlines()[-1]} --output {tmp_path / 'second.png'}"
    environment = {**os.environ, "LORA_SERVER": server_address, "PATH": str(BIN)}
    subprocess.run(["/bin/sh", "-c", command], env=environment, check=True, capture_output=True)
    assert (tmp_path / "second.png").read_bytes() == first.read_bytes()


def test_trigger_words_come_before_the_prompt(client: LoraClient, server_address: str, demo_adapters: Path) -> None:
    """They are shown, used if asked for, and in the provenance; the picture is that of the whole prompt."""
    words = '{"trigger_words": ["a small blue ring", "glow"]}'
    path = with_words(demo_adapters / "a", demo_adapters / "worded", words)
    assert client.adapters.load(str(path), name="worded").current.trigger_words == ("a small blue ring", "glow")
    got = subprocess.run(
        [BIN / "lora-client", "adapters", "get", "worded", "--server", server_address], capture_output=True, text=True
    )
    assert "a small blue ring, glow" in got.stdout
    asked = client.generate(PROMPT, seed=1, adapters=["worded,trigger"], options=QUICK).images[0]
    whole = f"a small blue ring, glow, {PROMPT}"
    assert asked.provenance.prompt == whole
    assert asked.provenance.adapters[0].use_trigger_words
    written = client.generate(whole, seed=1, adapters=["worded"], options=QUICK).images[0]
    assert np.abs(pixels(asked.data).astype(int) - pixels(written.data)).max() <= 1  # the way may have changed between
    silent = client.generate(PROMPT, seed=1, adapters=["worded"], options=QUICK).images[0]
    assert silent.provenance.prompt == PROMPT
    assert (pixels(silent.data) != pixels(asked.data)).any()
    with pytest.raises(AdapterMalformedError, match=r"lora_inference\.json"):
        client.adapters.load(str(with_words(demo_adapters / "a", demo_adapters / "misworded", "[]")))


def test_settings_that_would_do_nothing_are_refused_by_name(client: LoraClient) -> None:
    """An unknown component, a pattern without modules, words that are not there, a schedule between two steps."""
    for text, field in [
        ("neon,text_encoder_9=1", "component_scales[0].component"),
        ("neon,transformer_blocks.99=1", "block_scales[0].pattern"),
        ("neon,trigger", "use_trigger_words"),
        ("neon,start=0.3,end=0.4", "schedule"),
    ]:
        with pytest.raises(InvalidRequestError) as refused:
            client.generate(PROMPT, adapters=[text], options=QUICK)
        assert [fault.field for fault in refused.value.field_faults] == [f"spec.adapters[0].{field}"]


def test_lists_come_in_pages_of_a_stable_order(client: LoraClient, server_address: str, demo_adapters: Path) -> None:
    """Every adapter once and by name, whatever comes and goes meanwhile; a strange token is refused."""
    for name in ("zz-2", "zz-4", "zz-1", "zz-3"):
        client.adapters.load(str(demo_adapters / "b"), name=name)
    with grpc.insecure_channel(server_address) as channel:
        stub = adapter_service_pb2_grpc.AdapterServiceStub(channel)

        def page(token: str) -> tuple[list[str], str]:
            asked = messages.ListAdaptersRequest(page_size=2, page_token=token, name_prefix="zz-")
            listed = stub.ListAdapters(asked, timeout=10)
            return [adapter.name for adapter in listed.adapters], listed.next_page_token

        names, token = page("")
        assert names == ["zz-1", "zz-2"]
        client.adapters.unload("zz-1")
        client.adapters.load(str(demo_adapters / "b"), name="zz-0")
        assert page(token) == (["zz-3", "zz-4"], "")
        with pytest.raises(grpc.RpcError) as refused:
            page("no token")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_lists_are_filtered_by_state_and_name(client: LoraClient, server_address: str, demo_adapters: Path) -> None:
    """Both filters, from the library and from the command line, by name."""
    for name in ("zz-2", "zz-10", "zz-1"):
        client.adapters.load(str(demo_adapters / "b"), name=name)
    assert [each.name for each in client.adapters.list(name_prefix="zz-")] == ["zz-1", "zz-10", "zz-2"]
    cached = client.adapters.list(states=["cached", "resident"], name_prefix="zz-1")
    assert [each.name for each in cached] == ["zz-1", "zz-10"]
    assert client.adapters.list(states=["failed"]) == ()
    with pytest.raises(ValueError, match="unknown state 'warm'"):
        client.adapters.list(states=["warm"])
    command = [BIN / "lora-client", "adapters", "list", "--prefix", "zz-2", "--state", "cached", "--state", "resident"]
    listed = subprocess.run(
        [*command, "--json", "--server", server_address], capture_output=True, text=True, check=True
    )
    assert [each["name"] for each in json.loads(listed.stdout)] == ["zz-2"]

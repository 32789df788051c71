"""A pipeline without a family behind the whole service: detected, driven, told of by GetServerInfo."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import PixArtSigmaPipeline
from lora_client import GenerationOptions, LoraClient, LoraClientError
from lora_client.types import Completed, Preview, Progress

from tests.conftest import BIN
from tests.factories import write_adapter
from tests.parity import tiny_flow
from tests.parity.harness import write_adapters
from tests.parity.subjects_flow import FLUX

OPTIONS = GenerationOptions(width_px=64, height_px=64, num_inference_steps=4)


@dataclass(frozen=True)
class Served:
    """A client, and the folder that adapters lie in."""

    client: LoraClient
    root: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A true `lora-server` with the tiny PixArt-Sigma, an adapter for it, and adapters for FLUX.1."""
    root = tmp_path_factory.mktemp("whole")
    model = tiny_flow.build_pixart(root / "model")
    write_adapter(root / "own", PixArtSigmaPipeline.from_pretrained(model).transformer, 1, 0.3, target_modules=["to_q"])
    write_adapters(FLUX, FLUX.build(root / "other"), root / "foreign")
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--model", model, "--adapter-root", root]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        with LoraClient(server.stdout.readline().split()[-1]) as client:
            yield Served(client, root)
    finally:
        server.terminate()
        server.wait(timeout=40)
        server.stdout.close()


def test_server_info_says_the_path_and_its_cost(served: Served) -> None:
    """A client learns that its request will wait for others, before it asks."""
    model = served.client.server_info().model
    assert (model["pipeline_class"], model["execution"]) == ("PixArtSigmaPipeline", "EXECUTION_PATH_WHOLE_PIPELINE")
    assert "A request waits for all before it" in model["execution_cost"]


def test_streams_progress_previews_and_the_images(served: Served) -> None:
    """The stream is that of any model; adapters are merged, images are drawn one by one."""
    options = GenerationOptions(
        width_px=64, height_px=64, num_inference_steps=4, num_images=2, preview_interval_steps=2
    )
    events = list(served.client.stream_generate("a star", adapters=[str(served.root / "own")], options=options))
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.completed_steps, last.total_steps) == (8, 8)
    assert any(isinstance(event, Preview) for event in events)
    (completed,) = [event for event in events if isinstance(event, Completed)]
    assert (completed.stats.way, completed.stats.mean_batch_images) == ("merged", 1.0)


def test_an_adapter_of_another_family_is_refused_with_both_named(served: Served) -> None:
    """What the adapter is for, and what is served."""
    with pytest.raises(LoraClientError, match=r"is for FLUX\.1.* is PixArtSigma") as caught:
        served.client.adapters.load(str(served.root / "foreign" / "b"))
    assert caught.value.reason == "ADAPTER_INCOMPATIBLE"


def test_leaving_a_stream_cancels_the_pipelines_call(served: Served) -> None:
    """The next request does not wait for what nobody reads."""
    long = GenerationOptions(width_px=64, height_px=64, num_inference_steps=500)
    stream = served.client.stream_generate("a star", options=long)
    while not isinstance(next(stream), Progress):
        pass
    stream.close()
    result = served.client.generate("a star", options=OPTIONS)
    assert result.stats.queue_time_s < 5

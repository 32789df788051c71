"""A UNet model behind the whole service: detected, warmed up, stepped in mixed batches, told of by GetServerInfo."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lora_client import GenerationOptions, LoraClient, LoraClientError
from lora_client.types import Completed, Preview, Progress

from tests.conftest import BIN
from tests.parity.harness import write_adapters
from tests.parity.subjects_unet import SD1, SDXL


@dataclass(frozen=True)
class Served:
    """A client, and the folder that adapters lie in."""

    client: LoraClient
    root: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A true `lora-server` with the tiny SD 1.5, whose own scheduler (PNDM) takes one step more than it is asked."""
    root = tmp_path_factory.mktemp("unet")
    model = SD1.build(root / "model")
    write_adapters(SD1, model, root / "own")
    write_adapters(SDXL, SDXL.build(root / "other"), root / "foreign")
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--model", model, "--adapter-root", root]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        with LoraClient(server.stdout.readline().split()[-1]) as client:
            for name in ("conv", "text"):
                client.adapters.load(str(root / "own" / name), name=name)
            yield Served(client, root)
    finally:
        server.terminate()
        server.wait(timeout=40)
        server.stdout.close()


def test_server_info_tells_family_and_schedulers(served: Served) -> None:
    """A client learns what it may ask for."""
    model = served.client.server_info().model
    assert (model["family"], model["pipeline_class"]) == ("sd1", "StableDiffusionPipeline")
    assert "euler_ancestral" in model["schedulers"]
    assert model["adaptable_components"] == ["text_encoder", "unet"]


def test_progress_counts_the_schedulers_own_steps(served: Served) -> None:
    """Progress ends at its total, also where a scheduler takes other steps than asked; previews come on the way."""
    options = GenerationOptions(num_inference_steps=4, num_images=2, preview_interval_steps=2)
    events = list(served.client.stream_generate("a red star", adapters=["conv", "text"], options=options))
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.completed_steps, last.total_steps) == (10, 10)
    assert any(isinstance(event, Preview) for event in events)
    assert isinstance(events[-1], Completed)


def test_a_named_scheduler_draws_another_picture_and_is_told(served: Served) -> None:
    """The scheduler is in the provenance, and a retry with it gives the same bytes."""
    own, euler, again = (
        served.client.generate(
            "a star", seed=1, adapters=["conv"], options=GenerationOptions(num_inference_steps=4, scheduler=name)
        ).images[0]
        for name in (None, "euler_ancestral", "euler_ancestral")
    )
    assert (own.provenance.scheduler, euler.provenance.scheduler) == (None, "euler_ancestral")
    assert euler.data == again.data != own.data


@pytest.mark.parametrize(("scheduler", "steps"), [("plms", 4), ("lcm", 60)])
def test_what_a_scheduler_cannot_do_is_an_invalid_request(served: Served, scheduler: str, steps: int) -> None:
    """Unknown names, and steps that a scheduler does not take, are told by field; the server serves on."""
    options = GenerationOptions(num_inference_steps=steps, scheduler=scheduler)
    with pytest.raises(LoraClientError, match=r"spec\.(scheduler|num_inference_steps)") as caught:
        served.client.generate("a star", options=options)
    assert caught.value.reason == "INVALID_REQUEST"
    served.client.generate("a star", options=GenerationOptions(num_inference_steps=2))


def test_an_adapter_of_another_model_is_refused(served: Served) -> None:
    """An SDXL adapter does not fit, and both families are named."""
    with pytest.raises(LoraClientError, match=r"is for SDXL.*is SD 1\.x") as caught:
        served.client.adapters.load(str(served.root / "foreign" / "a"), name="foreign")
    assert caught.value.reason == "ADAPTER_INCOMPATIBLE"

"""The whole vertical: a true server, the embedded model, the thin client and its command line."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_client import AdapterUse, AsyncLoraClient, Completed, GenerationOptions, ImageReady, LoraClient, Preview
from lora_client import Progress as ProgressEvent
from lora_client.errors import (
    AdapterIncompatibleError,
    AdapterMalformedError,
    AdapterNotFoundError,
    AdapterOutputNotFiniteError,
    AdapterSourceForbiddenError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraClientError,
)
from PIL import Image as PillowImage
from safetensors.torch import save_file

from tests.conftest import BIN

PROMPT = "a red star on a navy background"
QUICK = GenerationOptions(num_inference_steps=3)


@pytest.fixture
def client(server_address: str) -> LoraClient:
    """A client of the session's server."""
    return LoraClient(server_address, timeout_s=60)


def test_base_is_byte_identical_before_and_after_adapters(client: LoraClient, demo_adapters: Path) -> None:
    """A request without adapters gets the base model, whatever was active before."""
    before = client.generate(PROMPT, seed=1, options=QUICK).images[0].data
    adapted = client.generate(PROMPT, seed=1, adapters=[str(demo_adapters / "a")], options=QUICK)
    assert adapted.images[0].data != before
    assert adapted.stats.way in ("merged", "slots")  # whichever this machine measured to be cheaper
    assert client.generate(PROMPT, seed=1, options=QUICK).images[0].data == before


def test_by_name_id_digest_and_path_are_one_adapter(client: LoraClient, demo_adapters: Path) -> None:
    """Every selector reaches the same version, and with it the same picture."""
    adapter = client.adapters.load(str(demo_adapters / "b"), name="bee", id=77)
    uses = [
        AdapterUse(name="bee"),
        AdapterUse(id=77),
        AdapterUse(digest=adapter.current_digest),
        AdapterUse(path=str(demo_adapters / "b")),
        AdapterUse(name="bee", expected_digest=adapter.current_digest),
    ]
    images = [client.generate(PROMPT, seed=1, adapters=[use], options=QUICK).images[0] for use in uses]
    assert {image.provenance.adapters[0].digest for image in images} == {adapter.current_digest}
    first, *others = (pixels(image.data).astype(int) for image in images)
    # The way of applying may change between requests by measured cost, and float32 rounds them differently.
    assert all(np.abs(other - first).max() <= 1 for other in others)


def test_stream_tells_progress_previews_images_and_stats(client: LoraClient) -> None:
    """Events come in order; stats are last; image k has seed + k."""
    options = GenerationOptions(num_inference_steps=4, num_images=2, preview_interval_steps=2)
    events = list(client.stream_generate(PROMPT, seed=5, options=options))
    assert isinstance(events[-1], Completed)
    images = [event.image for event in events if isinstance(event, ImageReady)]
    assert sorted(image.seed for image in images) == [5, 6]
    assert [e.total_steps for e in events if isinstance(e, ProgressEvent)][-1] == 8
    preview = next(event for event in events if isinstance(event, Preview))
    assert PillowImage.open(io.BytesIO(preview.data)).format == "JPEG"
    alone = client.generate(PROMPT, seed=6, options=GenerationOptions(num_inference_steps=4)).images[0]
    assert alone.provenance == next(image for image in images if image.seed == 6).provenance


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_formats_carry_provenance(client: LoraClient, tmp_path: Path, image_format: str) -> None:
    """Each format can be shown again by the command line."""
    options = GenerationOptions(num_inference_steps=2, format=image_format)
    image = client.generate('a "blue" ring, 100%', seed=3, adapters=["neon:0.5"], options=options).images[0]
    path = image.save(tmp_path / f"x.{image_format}")
    shown = subprocess.run([BIN / "lora-client", "show", path, "--json"], capture_output=True, text=True, check=True)
    provenance = json.loads(shown.stdout)["provenance"]
    assert provenance["prompt"] == 'a "blue" ring, 100%'
    assert provenance["adapters"][0]["scale"] == 0.5


def test_the_shown_command_makes_the_picture_again(client: LoraClient, server_address: str, tmp_path: Path) -> None:
    """`show` prints a command line; run, it gives the same bytes."""
    environment = {"LORA_SERVER": server_address, "PATH": str(BIN)}
    first = tmp_path / "first.png"
    client.generate(PROMPT, seed=9, adapters=["neon:-0.25"], options=QUICK).images[0].save(first)
    shown = subprocess.run([BIN / "lora-client", "show", first], capture_output=True, text=True, check=True)
    command = f"{shown.stdout.splitlines()[-1]} --output {tmp_path / 'second.png'}"
    subprocess.run(["/bin/sh", "-c", command], env=environment, check=True, capture_output=True)
    assert (tmp_path / "second.png").read_bytes() == first.read_bytes()


def test_the_seeds_command_line_works(server_address: str, demo_adapters: Path, tmp_path: Path) -> None:
    """Every option of the seed's lora_inference, underscores included."""
    command = [
        BIN / "lora-client", "generate", "--prompt", PROMPT, "--seed", "3", "--height", "64", "--width", "64",
        "--num_inference_steps", "2", "--lora_path", demo_adapters / "a", "--lora-scale", "0.5",
        "--output", tmp_path / "o.png", "--server", server_address,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with PillowImage.open(tmp_path / "o.png") as image:
        assert image.size == (64, 64)


def test_bad_requests_get_their_reasons_and_the_server_serves_on(client: LoraClient, demo_adapters: Path) -> None:
    """Invalid, unknown, forbidden, incompatible: each its own class, and the next request is served."""
    with pytest.raises(InvalidRequestError) as invalid:
        client.generate("", adapters=["neon", "neon"], options=GenerationOptions(width_px=100))
    assert len(invalid.value.field_faults) == 3
    with pytest.raises(AdapterNotFoundError):
        client.generate(PROMPT, adapters=["nobody"])
    with pytest.raises(AdapterSourceForbiddenError):
        client.adapters.load("/etc")
    broken = demo_adapters / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterMalformedError):
        client.adapters.load(str(broken))
    with pytest.raises((AdapterIncompatibleError, AdapterMalformedError)):
        client.adapters.load(str(demo_adapters / "text" / "text_encoder"))
    assert client.generate(PROMPT, options=QUICK).images


def test_a_picture_that_is_not_finite_is_an_error_that_names_the_adapter(
    client: LoraClient, server_address: str, demo_adapters: Path, tmp_path: Path
) -> None:
    """In float32 its factors are finite and what the network makes of them is not; the base is untouched."""
    before = client.generate(PROMPT, seed=1, options=QUICK).images[0].data
    module = "transformer.proj_out.lora_"
    factors = {"A": torch.full((4, 160), 1e19), "B": torch.full((64, 4), 1e19)}
    save_file({f"{module}{name}.weight": value for name, value in factors.items()}, demo_adapters / "huge.safetensors")
    with pytest.raises(AdapterOutputNotFiniteError) as caught:
        client.generate(PROMPT, seed=1, adapters=[str(demo_adapters / "huge.safetensors")], options=QUICK)
    assert (caught.value.code, caught.value.metadata["adapters"]) == ("FAILED_PRECONDITION", "huge.safetensors")
    command = [
        BIN / "lora-client", "generate", "--prompt", PROMPT, "--lora", demo_adapters / "huge.safetensors",
        "--num-inference-steps", "2", "--output", tmp_path / "huge.png", "--server", server_address, "--quiet",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (5, "")
    assert "not finite" in ended.stderr and "ADAPTER_OUTPUT_NOT_FINITE" in ended.stderr  # noqa: PT018
    assert not (tmp_path / "huge.png").exists()
    assert client.generate(PROMPT, seed=1, options=QUICK).images[0].data == before


def test_a_prompt_that_is_cut_is_told_by_the_commands(server_address: str, tmp_path: Path) -> None:
    """As a warning on standard error, quiet or not, with what cannot be printed escaped; and by `show`."""
    prompt = "a big red star on a navy background " * 3 + "with a \x1b[31mring"
    command = [
        BIN / "lora-client", "generate", "--prompt", prompt, "--num-inference-steps", "2", "--quiet",
        "--output", tmp_path / "long.png", "--server", server_address, "--json",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: the prompt has ")]
    told = json.loads(ended.stdout)["stats"]["prompt_truncations"]
    assert len(warnings) == len(told) > 0
    assert told[0]["dropped_text"].endswith("ring")
    assert "\\x1b[31mring" in warnings[0]
    shown = subprocess.run(
        [BIN / "lora-client", "show", tmp_path / "long.png"], capture_output=True, text=True, check=True
    )
    assert f"the prompt has {told[0]['num_tokens']} tokens, of which 'text_encoder' reads" in shown.stdout


def test_a_negative_prompt_without_effect_is_refused(client: LoraClient) -> None:
    """And accepted where guidance acts, or where there is none."""
    off = GenerationOptions(num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(InvalidRequestError, match="set guidance_scale > 1"):
        client.generate(PROMPT, options=replace(off, negative_prompt="ring"))
    assert client.generate(PROMPT, options=off).images
    assert client.generate(PROMPT, options=replace(off, negative_prompt="ring", guidance_scale=1.5)).images


def test_a_retry_with_the_same_id_joins_and_is_paid_once(client: LoraClient) -> None:
    """Two calls with one request id get the same bytes of one run; another spec under it is refused."""
    options = GenerationOptions(num_inference_steps=4, request_id="retry-me")
    first = client.generate(PROMPT, options=options)
    second = client.generate(PROMPT, options=options)
    assert first.images[0].data == second.images[0].data
    assert first.stats == second.stats
    with pytest.raises(InvalidRequestError):
        client.generate("something else", options=options)


def test_leaving_a_stream_cancels_within_a_step(client: LoraClient) -> None:
    """Nothing goes on that nobody reads: the server is free long before the 500 steps are done."""
    events = client.stream_generate(PROMPT, options=GenerationOptions(num_inference_steps=500))
    for event in events:
        if isinstance(event, ProgressEvent):
            break
    events.close()
    deadline_s = time.monotonic() + 5
    while client.server_info().queue["running_requests"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_deadline_ends_the_request(server_address: str) -> None:
    """A call out of time fails as such, and leaves nothing running."""
    with LoraClient(server_address, timeout_s=0.5) as hurried, pytest.raises(DeadlineExceededError):
        hurried.generate(PROMPT, options=GenerationOptions(num_inference_steps=500))


def test_health_answers_while_images_are_made(client: LoraClient) -> None:
    """Generation never blocks the event loop: the median health check takes less than 50 ms."""
    worker = threading.Thread(
        target=client.generate, args=(PROMPT,), kwargs={"options": GenerationOptions(num_inference_steps=60)}
    )
    worker.start()
    times_s = []
    while worker.is_alive():
        began_s = time.monotonic()
        assert client.health()
        times_s.append(time.monotonic() - began_s)
        time.sleep(0.01)
    worker.join()
    assert sorted(times_s)[len(times_s) // 2] < 0.05


def pixels(data: bytes) -> np.ndarray:
    """The values of an encoded image, as signed numbers."""
    return np.asarray(PillowImage.open(io.BytesIO(data))).astype(int)


def test_asyncio_client_runs_requests_side_by_side(server_address: str) -> None:
    """The asyncio client has the same methods; requests with different adapters do not disturb one another."""

    async def run() -> None:
        async with AsyncLoraClient(server_address) as client:
            alone = await client.generate(PROMPT, seed=2, adapters=["neon"], options=QUICK)
            mixed = await asyncio.gather(
                *[client.generate(PROMPT, seed=2, adapters=uses, options=QUICK) for uses in (["neon"], [], ["neon:-1"])]
            )
            # In float32 a batch rounds differently than an image alone (tests/parity holds the bound).
            difference = np.abs(pixels(mixed[0].images[0].data) - pixels(alone.images[0].data))
            assert difference.max() <= 1
            assert (difference > 0).mean() <= 0.0005
            assert len({result.images[0].data for result in mixed}) == 3

    asyncio.run(run())


def test_control_plane_round_trip(client: LoraClient, demo_adapters: Path) -> None:
    """Load, pin, refuse, unpin, unload, gone."""
    adapter = client.adapters.load(str(demo_adapters / "text"), name="words", default_scale=0.25)
    assert [component.name for component in adapter.current.components] == ["text_encoder", "transformer"]
    assert client.adapters.pin("words", level="device").pin is not None
    with pytest.raises(LoraClientError) as pinned:
        client.adapters.unload("words")
    assert pinned.value.reason == "ADAPTER_PINNED"
    deadline_s = time.monotonic() + 5
    while client.adapters.get("words").current.state != "resident":  # no request has used it
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    client.adapters.unpin("words")
    result = client.generate(PROMPT, adapters=["words"], options=QUICK)
    assert result.stats.adapters[0].adapter.scale == 0.25
    assert client.adapters.unload("words") > 0
    assert "words" not in {each.name for each in client.adapters.list()}


def test_unary_generate_refuses_what_could_be_too_large_before_any_work(server_address: str) -> None:
    """The plain RPC returns a small image, and sends who wants more to the stream."""
    import grpc
    from lora_api.v1 import generation_service_pb2, generation_service_pb2_grpc
    from lora_client.errors import ResponseTooLargeError, from_rpc_error

    with grpc.insecure_channel(server_address) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        spec = generation_service_pb2.GenerationSpec(prompt=PROMPT, num_inference_steps=2)
        response = stub.Generate(generation_service_pb2.GenerateRequest(spec=spec))
        assert len(response.images) == 1
        spec.num_images = 16
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(generation_service_pb2.GenerateRequest(spec=spec, max_response_bytes=100_000))
        assert isinstance(from_rpc_error(refused.value), ResponseTooLargeError)


def test_reflection_and_health_know_the_services(server_address: str) -> None:
    """Every service is listed by reflection and has a health of its own."""
    import grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(server_address) as channel, LoraClient(server_address) as client:
        names = {name for name in ProtoReflectionDescriptorDatabase(channel).get_services() if "lora_api" in name}
        assert names == {f"lora_api.v1.{name}Service" for name in ("Generation", "Adapter", "Server")}
        assert all(client.health(name) for name in names)


def test_two_servers_do_not_share_a_port(server_address: str) -> None:
    """The second says so, in one line, and exits with 1 before it loads anything."""
    second = subprocess.run(
        [BIN / "lora-server", "serve", "--listen", server_address], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 1
    assert "error: cannot listen" in second.stderr

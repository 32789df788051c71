"""Pushing adapters to a server with a state directory: stored, loaded, replaced, refused, and gone when interrupted."""

from __future__ import annotations

import hashlib
import io
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from lora_api.v1 import adapter_service_pb2 as messages
from lora_api.v1 import adapter_service_pb2_grpc
from lora_client import GenerationOptions, LoraClient
from lora_client.errors import (
    AdapterAlreadyExistsError,
    AdapterMalformedError,
    AdapterNotFoundError,
    DiskFullError,
    InvalidRequestError,
    LoraClientError,
    StoreFullError,
    UploadMismatchError,
    UploadsDisabledError,
    from_rpc_error,
)
from PIL import Image

from tests.conftest import BIN

QUICK = GenerationOptions(num_inference_steps=2)


@contextmanager
def serving(state: Path, *options: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A true server with a state directory; killed at the end."""
    command = [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0", "--state-dir", state, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the server did not start"
        yield line.split()[-1], process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()


def stored(state: Path) -> list[str]:
    """The files in the state directory's store, by name."""
    return sorted(path.name for folder in ("store", "incoming") for path in (state / folder).rglob("*.*"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the module's server."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def address(state: Path, demo_adapters: Path) -> Iterator[str]:
    """The module's server."""
    with serving(state, "--adapter-root", demo_adapters) as (address, _):
        yield address


@pytest.fixture
def client(address: str) -> Iterator[LoraClient]:
    """A client of it; every adapter that a test left is unloaded."""
    with LoraClient(address, timeout_s=60) as client:
        before = {adapter.name for adapter in client.adapters.list()}
        yield client
        for adapter in client.adapters.list():
            if adapter.name not in before:
                client.adapters.unpin(adapter.name)
                client.adapters.unload(adapter.name)


def test_a_pushed_folder_draws_what_the_same_folder_on_the_server_draws(
    client: LoraClient, address: str, demo_adapters: Path, state: Path
) -> None:
    """By the command line; digest and picture are the same, the files lie in the store, and go with the adapter."""
    command = [BIN / "lora-client", "--server", address, "adapters", "push", demo_adapters / "text", "--name", "pushed"]
    shown = subprocess.run([*command, "--pin"], capture_output=True, text=True, check=True).stdout
    assert "upload://sha256:" in shown
    local = client.adapters.load(str(demo_adapters / "text"), name="local")
    pushed = client.adapters.get("pushed")
    assert pushed.current_digest == local.current_digest
    assert pushed.pin is not None
    pictures = {hashlib.sha256(pixels(client, [use])).hexdigest() for use in ("pushed:2", "local:2")}
    assert len(pictures) == 1
    assert "adapter_model.safetensors" in stored(state)
    client.adapters.unpin("pushed")
    client.adapters.unload("pushed")
    assert not stored(state)


def pixels(client: LoraClient, uses: list[str]) -> bytes:
    """A small picture with these adapters."""
    data = client.generate("a ring", seed=1, adapters=uses, options=QUICK).images[0].data
    return Image.open(io.BytesIO(data)).tobytes()


def test_the_next_push_under_a_name_is_its_next_version(client: LoraClient, demo_adapters: Path) -> None:
    """The name and its id stay; the old digest is refused or found, never served as something else."""
    first = client.adapters.push(demo_adapters / "a", name="style")
    second = client.adapters.push(demo_adapters / "b", name="style", default_scale=0.5)
    assert (first.ids, first.name) == (second.ids, second.name)
    assert first.current_digest != second.current_digest
    assert [version.digest for version in second.versions] == [second.current_digest, first.current_digest]
    old = client.generate("a ring", seed=1, adapters=[f"style@{first.current_digest}"], options=QUICK)
    assert old.stats.adapters[0].adapter.digest == first.current_digest
    again = client.adapters.push(demo_adapters / "b", name="style")
    assert again.current_digest == second.current_digest
    with pytest.raises(AdapterAlreadyExistsError):
        client.adapters.load(str(demo_adapters / "a"), name="style")


def test_a_broken_adapter_is_refused_and_its_files_are_gone(client: LoraClient, tmp_path: Path, state: Path) -> None:
    """What does not load is not kept, though every byte arrived."""
    before = stored(state)
    (tmp_path / "bad.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(AdapterMalformedError):
        client.adapters.push(tmp_path / "bad.safetensors", name="bad")
    with pytest.raises(AdapterNotFoundError):
        client.adapters.get("bad")
    assert stored(state) == before
    with pytest.raises(ValueError, match=r"neither a folder nor a \.safetensors"):
        client.adapters.push(tmp_path / "nothing")


def send(address: str, *parts: messages.UploadAdapterRequest) -> LoraClientError:
    """Sends *parts*; returns the error."""
    with grpc.insecure_channel(address) as channel:
        stub = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.UploadAdapter(iter(parts), timeout=30)
        return from_rpc_error(refused.value)


def manifest(*files: tuple[str, bytes]) -> messages.UploadAdapterRequest:
    """A manifest of *files*."""
    listed = [
        messages.UploadFile(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files
    ]
    return messages.UploadAdapterRequest(manifest=messages.UploadManifest(name="x", files=listed))


def chunk(data: bytes, offset_bytes: int = 0) -> messages.UploadAdapterRequest:
    """Bytes of the first file."""
    return messages.UploadAdapterRequest(chunk=messages.UploadChunk(data=data, offset_bytes=offset_bytes))


def test_streams_that_break_the_contract_are_refused_by_name(address: str, client: LoraClient, state: Path) -> None:
    """Order, paths, sizes and digests; nothing is kept."""
    del client
    before = stored(state)
    fine = manifest(("x.safetensors", b"hello"))
    assert isinstance(send(address, chunk(b"hello")), InvalidRequestError)
    assert isinstance(send(address, fine, fine), InvalidRequestError)
    assert isinstance(send(address, fine, chunk(b"")), InvalidRequestError)
    assert isinstance(send(address, fine, chunk(b"hellO")), UploadMismatchError)
    assert isinstance(send(address, fine), UploadMismatchError)
    for path in ("../x.safetensors", "/x.safetensors", "a/b/c.safetensors", ".x.json", "x.bin", "x\0.json", ""):
        refused = send(address, manifest((path, b"hello")), chunk(b"hello"))
        assert isinstance(refused, InvalidRequestError)
        assert refused.field_faults[0].field == "manifest.files[0].path"
    twice = send(address, manifest(("x.safetensors", b"a"), ("x.safetensors", b"a")))
    assert [fault.field for fault in twice.field_faults] == ["manifest.files[1].path"]
    assert stored(state) == before


def test_an_interrupted_upload_leaves_nothing(address: str, client: LoraClient, state: Path) -> None:
    """A caller that goes away in the middle is as if it had never come."""
    before = stored(state)
    go = threading.Event()

    def parts() -> Iterator[messages.UploadAdapterRequest]:
        yield manifest(("x.safetensors", b"hello"))
        yield chunk(b"hel")
        go.wait(20)

    with grpc.insecure_channel(address) as channel:
        stub = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        call = stub.UploadAdapter.future(parts(), timeout=30)
        while stored(state) == before:
            time.sleep(0.01)
        call.cancel()
        go.set()
    deadline = time.monotonic() + 10
    while stored(state) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stored(state) == before
    with pytest.raises(AdapterNotFoundError):
        client.adapters.get("x")


def test_a_store_that_is_full_and_a_full_disk_have_their_own_reasons(demo_adapters: Path, tmp_path: Path) -> None:
    """Refused with the manifest, before a byte is sent; nothing is left."""
    options = "--max-store-bytes", "1000", "--min-free-disk-bytes", str(2**62)
    with serving(tmp_path, *options) as (address, _), LoraClient(address) as client:
        with pytest.raises(StoreFullError, match="--max-store-bytes"):
            client.adapters.push(demo_adapters / "a", name="large")
        assert isinstance(send(address, manifest(("x.safetensors", b"hello")), chunk(b"hello")), DiskFullError)
        assert stored(tmp_path) == []


def test_a_server_without_a_state_directory_says_so(server_address: str, demo_adapters: Path) -> None:
    """The error names the flag; paths go on working."""
    with LoraClient(server_address) as client, pytest.raises(UploadsDisabledError, match="--state-dir"):
        client.adapters.push(demo_adapters / "a", name="x")


NAMES = [
    "My Style (v2) [final]", "水彩", "a&b #1", "100%", "what?", "a+b", "a:b", "-dash", "🎨 paint",
    "e\u0301te\u0301", "it's", 'a "quote"', "a,b=1", "a@b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_pushed_and_loaded(
    client: LoraClient, demo_adapters: Path, tmp_path: Path, name: str
) -> None:
    """Alone and in a folder, beside what is no weights; and two names are two adapters."""
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / f"{name}.safetensors"
    shutil.copy(bare_adapter(tmp_path), file)
    (folder / "._x.safetensors").write_bytes(b"of macOS")
    (folder / "optimizer.safetensors").write_bytes(b"of a training")
    alone, inside = client.adapters.push(file), client.adapters.push(folder, name="inside")
    assert alone.current.components
    assert inside.current.components == alone.current.components
    other = client.adapters.push(shutil.copy(file, folder / f"{name}风.safetensors"))
    assert other.name != alone.name


def bare_adapter(folder: Path) -> Path:
    """A file that needs no configuration."""
    import torch
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 160), f"{name}.lora_B.weight": torch.ones(160, 4)}
    save_file(tensors, folder / "bare.safetensors")
    return folder / "bare.safetensors"


WRONG_NAMES = {
    "../x.safetensors": "dot", "a/../x.safetensors": "parts", "/x.safetensors": "no characters",
    "a\\b.safetensors": "backslash", "x\x00.safetensors": "printed", "x\x1b[2J.safetensors": "printed",
    "\u202ex.safetensors": "printed",
    f"{'x' * 250}.safetensors": "bytes", "x.bin": "must end in", "..safetensors": "dot",
}  # fmt: skip


@pytest.mark.parametrize("path", WRONG_NAMES)
def test_a_name_that_is_not_taken_is_said_with_why(address: str, path: str) -> None:
    """In the fault of its field."""
    refused = send(address, manifest((path, b"hello")), chunk(b"hello"))
    assert isinstance(refused, InvalidRequestError)
    assert refused.field_faults[0].field == "manifest.files[0].path"
    assert WRONG_NAMES[path] in refused.field_faults[0].description


def test_two_spellings_of_one_name_are_refused(address: str) -> None:
    """Composed and decomposed letters are one file on some disks."""
    refused = send(address, manifest(("a/e\u0301.json", b"a"), ("a/\xe9.json", b"a")))
    assert "twice" in refused.field_faults[0].description


def test_a_name_of_digits_is_reached_by_name(client: LoraClient, address: str, tmp_path: Path) -> None:
    """By every command; what no name is, is an id."""
    pushed = client.adapters.push(bare_adapter(tmp_path), name="123")
    other = client.adapters.push(bare_adapter(tmp_path), name="other")
    command = [BIN / "lora-client", "--server", address]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True)

    assert str(pushed.ids[0]) in run("adapters", "get", "123").stdout
    assert "other" in run("adapters", "get", str(other.ids[0])).stdout
    no_id = run("adapters", "get", "9" * 30)
    assert no_id.returncode == 2
    assert "id" in no_id.stderr
    assert "Traceback" not in no_id.stderr
    drawn = run(
        "generate",
        "--prompt",
        "a ring",
        "--lora",
        "123",
        "--num-inference-steps",
        "1",
        "--output",
        str(tmp_path / "x.png"),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert run("adapters", "unload", "123").returncode == 0
    with pytest.raises(AdapterNotFoundError):
        client.adapters.get("123")


def test_an_upload_that_announces_and_sends_nothing_is_ended(tmp_path: Path, demo_adapters: Path) -> None:
    """With the reason of a broken upload; its room is given back, and as many at a time as one may have."""
    options = "--stalled-upload-timeout", "1", "--max-uploads-per-tenant", "2"
    with serving(tmp_path, *options) as (address, _), grpc.insecure_channel(address) as channel:
        stub = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        release = threading.Event()

        def silent() -> Iterator[messages.UploadAdapterRequest]:
            yield manifest(("x.safetensors", b"hello"))
            release.wait(30)

        calls = [stub.UploadAdapter.future(silent(), timeout=60) for _ in range(3)]
        errors = [from_rpc_error(call.exception()) for call in calls]
        release.set()
        assert sorted(error.reason for error in errors) == ["QUEUE_FULL", "UPLOAD_MISMATCH", "UPLOAD_MISMATCH"]
        assert stored(tmp_path) == []

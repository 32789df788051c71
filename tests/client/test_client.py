"""The thin client without a server: parsing, assembly, imports, spelling of options."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lora_api.v1 import generation_service_pb2, image_pb2
from lora_client import AdapterUse
from lora_client._assembly import Assembly
from lora_client._channel import call_metadata
from lora_client._results import shortest
from lora_client.errors import ProtocolError
from lora_client.types import ImageReady

DIGEST = "sha256:" + "0a" * 32


def test_importing_the_client_imports_nothing_heavy() -> None:
    """No torch, no server, and no library of the command line."""
    code = "import lora_client, sys; print([m for m in sys.modules if m.split('.')[0] in {names}])"
    names = "{'torch', 'diffusers', 'numpy', 'lora_server', 'typer', 'rich', 'PIL', 'transformers', 'peft'}"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{names}", names)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("neon", AdapterUse(name="neon")),
        ("neon:0.5", AdapterUse(name="neon", scale=0.5)),
        ("neon:-1e-1", AdapterUse(name="neon", scale=-0.1)),
        (f"neon@{DIGEST}:2", AdapterUse(name="neon", expected_digest=DIGEST, scale=2.0)),
        (f"{DIGEST}", AdapterUse(digest=DIGEST)),
        (f"{DIGEST}:.5", AdapterUse(digest=DIGEST, scale=0.5)),
        ("/a/b:c", AdapterUse(path="/a/b:c")),
        ("/a/b:1", AdapterUse(path="/a/b", scale=1.0)),
    ],
)
def test_adapters_are_read_from_text(text: str, use: AdapterUse) -> None:
    """NAME, NAME@DIGEST, DIGEST and PATH, each with a scale."""
    assert AdapterUse.parse(text) == use


@given(st.text(max_size=30))
def test_any_text_is_an_adapter_or_a_value_error(text: str) -> None:
    """The parser has no third outcome."""
    try:
        AdapterUse.parse(text)
    except ValueError:
        return


@example(3.4025001647762064e38)  # the nearest decimals of few digits overflow
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_shortest_is_the_same_float32(value: float) -> None:
    """What is shown converts back to what was sent."""
    import struct

    assert struct.pack("<f", shortest(value)) == struct.pack("<f", value)


def test_composition_hash_ignores_order() -> None:
    """A balancer sees one composition, however it is written."""
    a, b = AdapterUse(name="a"), AdapterUse(id=3)
    assert call_metadata([a, b]) == call_metadata([b, a])
    assert call_metadata([a]) != call_metadata([b])


def chunk(
    offset: int, data: bytes, info: image_pb2.ImageInfo | None = None
) -> generation_service_pb2.StreamGenerateResponse:
    """A response with a chunk of image 0."""
    body = generation_service_pb2.ImageChunk(image_index=0, offset_bytes=offset, data=data, info=info)
    return generation_service_pb2.StreamGenerateResponse(image_chunk=body)


def info(data: bytes, size: int | None = None) -> image_pb2.ImageInfo:
    """What a server says of an image."""
    size = len(data) if size is None else size
    return image_pb2.ImageInfo(size_bytes=size, sha256=hashlib.sha256(data).hexdigest(), format="IMAGE_FORMAT_PNG")


def test_chunks_become_a_verified_image() -> None:
    """The image is ready with its last byte, not before."""
    assembly = Assembly()
    assert assembly.feed(chunk(0, b"ab", info(b"abc"))) is None
    ready = assembly.feed(chunk(2, b"c"))
    assert isinstance(ready, ImageReady)
    assert ready.image.data == b"abc"


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(0, b"ab")],
        [chunk(1, b"b", info(b"ab"))],
        [chunk(0, b"a", info(b"abc")), chunk(2, b"c")],
        [chunk(0, b"abcd", info(b"abcd", 3))],
        [chunk(0, b"abx", info(b"abc"))],
        [chunk(0, b"a", info(b"abc", 2**40))],
        [chunk(0, b"a", info(b"abc")), chunk(0, b"a", info(b"abc"))],
        [
            chunk(0, b"a", info(b"abc")),
            generation_service_pb2.StreamGenerateResponse(stats=generation_service_pb2.GenerationStats()),
        ],
    ],
)
def test_a_lying_server_is_found_out(chunks: list[generation_service_pb2.StreamGenerateResponse]) -> None:
    """Missing, repeated, too many or wrong bytes are a ProtocolError, never a picture."""
    assembly = Assembly()
    with pytest.raises(ProtocolError):
        list(map(assembly.feed, chunks))

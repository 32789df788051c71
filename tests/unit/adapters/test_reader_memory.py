"""What reading a large adapter takes at its peak: the file, the converted tensors and 16 MiB, whatever its kind."""

from __future__ import annotations

import ctypes
import gc
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lora_server.adapters.formats.header import Limits, TensorFile, header_of_bytes
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.errors import AdapterIncompatibleError, AdapterMalformedError
from lora_server.models.weights import LinearShape
from safetensors.torch import save, save_file
from torch import Tensor

WIDTH, RANK = 1536, 32
SLACK_BYTES = 16 * 1024 * 1024
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def blocks(kind: str, dtype: torch.dtype, count: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of *count* blocks of four layers each."""
    down, up = torch.randn(RANK, WIDTH).to(dtype), torch.randn(WIDTH, RANK).to(dtype)
    for path in (f"blocks_{k}_{layer.replace('.', '_')}" for k in range(count) for layer in LAYERS):
        if kind == "loha":
            for half in ("1", "2"):
                yield f"lycoris_{path}.hada_w{half}_a", up[:, :8].clone()
                yield f"lycoris_{path}.hada_w{half}_b", down[:8].clone()
            continue
        yield f"lora_unet_{path}.lora_down.weight", down.clone()
        yield f"lora_unet_{path}.lora_up.weight", up.clone()
        yield f"lora_unet_{path}.alpha", torch.tensor(RANK * 0.7)
        if kind == "dora":
            yield f"lora_unet_{path}.dora_scale", torch.ones(WIDTH, 1)


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, which counts kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def begin() -> int:
    """Begins to measure a peak; returns the bytes of now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


@pytest.mark.parametrize(
    ("kind", "dtype", "count"),
    [
        pytest.param("lora", torch.bfloat16, 80, id="LoRA, as it is"),
        pytest.param("lora", torch.float32, 40, id="LoRA, narrowed"),
        pytest.param("lora", torch.float8_e4m3fn, 80, id="LoRA, widened"),
        pytest.param("dora", torch.bfloat16, 50, id="DoRA, a formula"),
        pytest.param("loha", torch.bfloat16, 40, id="LoHa, multiplied out"),
    ],
)
def test_the_peak_is_the_file_and_the_tensors(tmp_path: Path, kind: str, dtype: torch.dtype, count: int) -> None:
    """No tensor is there three times: in the file, as converted, and once more on the way."""
    torch.manual_seed(0)
    file = tmp_path / "large.safetensors"
    save_file(dict(blocks(kind, dtype, count)), file)
    shapes = {f"blocks.{k}.{layer}": LinearShape(WIDTH, WIDTH) for k in range(count) for layer in LAYERS}
    model = "tiny", "tiny", "transformer"
    loader = AdapterLoader(AdapterRoots([tmp_path]), {"transformer": shapes}, model, torch.bfloat16, LimitsConfig())
    before = begin()
    weights = loader.load(file).weights
    grown, allowed = status_bytes("VmHWM") - before, file.stat().st_size + weights.size_bytes + SLACK_BYTES
    assert weights.size_bytes > 30e6, "large enough to be told from the slack"
    assert grown <= allowed, f"took {grown / 1e6:.0f} MB, {allowed / 1e6:.0f} are allowed"


ONE = {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 1]}
HOSTILE: dict[str, Callable[[], dict[str, object]]] = {
    "many tensors": lambda: {f"{k}.lora_A.weight": {**ONE, "data_offsets": [k, k + 1]} for k in range(32_000)},
    "many fields": lambda: {"__metadata__": {str(k): "" for k in range(600_000)}, "x.lora_A.weight": ONE},
    "large fields": lambda: {"__metadata__": {str(k): "\U0001f600" + "x" * 300_000 for k in range(25)}, "a": ONE},
    "nested": lambda: {"x": [[[]]] * 1_500_000},
    "a large name": lambda: {"x" * 8_000_000: ONE},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_takes_no_more_than_the_slack(tmp_path: Path, case: str) -> None:
    """Parsed as a whole, each of these would take from 60 to 250 MB."""
    text = json.dumps(HOSTILE[case](), separators=(",", ":"), ensure_ascii=False).encode()
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32_000 if case == "many tensors" else 1))
    del text
    loader = AdapterLoader(
        AdapterRoots([tmp_path]),
        {"transformer": {"x": LinearShape(4, 4)}},
        ("tiny", "tiny", "transformer"),
        torch.bfloat16,
        LimitsConfig(),
    )
    before = begin()
    with pytest.raises((AdapterMalformedError, AdapterIncompatibleError)):
        loader.load_partial(file)
    grown, allowed = status_bytes("VmHWM") - before, file.stat().st_size + SLACK_BYTES
    assert grown <= allowed, f"took {grown / 1e6:.0f} MB, {allowed / 1e6:.0f} are allowed"


CARD_BYTES, FRONT_BYTES = 256 * 1024, 24 * 1024
"""As docs/formats.md has it."""


def filled(before: str, item: str, after: str, size_bytes: int) -> bytes:
    """A text of that size or a little less, of *item* again and again."""
    return (before + item * ((size_bytes - len(before) - len(after)) // len(item)) + after).encode()


def hostile_cards(scale: int) -> dict[str, bytes]:
    """Every card as large as it may be, or *scale* times that, of what takes the most memory when it is parsed."""
    objects = filled('{"activation text":"sidecar","":[', "{},", "1]}", scale * CARD_BYTES)
    settings = filled('{"trigger_words":[', "[],", "1]}", scale * CARD_BYTES)
    front = filled("---\ntrigger: card\nx: [", "{a},", "]\n---\n", scale * FRONT_BYTES)
    return {"x.json": objects, "lora_inference.json": settings, "README.md": front}


@pytest.mark.parametrize("scale", [1, 4], ids=["as large as they may be", "larger"])
@pytest.mark.parametrize("names", [("x.json",), ("lora_inference.json",), ("README.md",), ("x.json", "README.md")])
def test_hostile_cards_take_no_more_than_most_of_the_slack(tmp_path: Path, names: tuple[str, ...], scale: int) -> None:
    """Alone and together, and in less than a second; what is too large is as good as absent."""
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 1)}, file)
    for name, content in hostile_cards(scale).items():
        if name in names:
            (tmp_path / name).write_bytes(content)
    shapes = {"transformer": {"x": LinearShape(4, 4)}}
    model = "tiny", "tiny", "transformer"
    loader = AdapterLoader(AdapterRoots([tmp_path]), shapes, model, torch.bfloat16, LimitsConfig())
    before, began_s = begin(), time.thread_time()
    if refused := "lora_inference.json" in names and scale == 1:
        with pytest.raises(AdapterMalformedError, match=r"lora_inference\.json"):
            loader.load(file)
    words = () if refused else loader.load(file).report.trigger_words
    grown, seconds = status_bytes("VmHWM") - before, time.thread_time() - began_s
    expected = {"x.json": ("sidecar",), "README.md": ("card",)}.get(names[0], ())
    assert words == (expected if scale == 1 else ())
    assert grown <= 0.75 * SLACK_BYTES, f"took {grown / 1e6:.1f} MB"
    assert seconds < 1, f"took {seconds:.1f} s"


def test_metadata_that_is_too_large_is_left_out_unless_the_weights_depend_on_it() -> None:
    """A thumbnail of a megabyte costs nobody the adapter; configurations that cannot be kept are refused by name."""
    tensor = {"x.lora_A.weight": torch.ones(1, 1)}
    long = "x" * 500_000
    header = header_of(save(tensor, {"modelspec.thumbnail": long, "modelspec.title": 'Ünïcode \\ "x"'}))
    assert header.metadata == {"modelspec.title": 'Ünïcode \\ "x"'}
    with pytest.raises(AdapterMalformedError, match="lora_adapter_metadata"):
        header_of(save(tensor, {"lora_adapter_metadata": long}))


def header_of(data: bytes) -> TensorFile:
    """The header of a file."""
    return header_of_bytes("x", "x.safetensors", data, Limits())


MEMBER = r'"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "text",
    [
        "{%s}   ",
        ' {\n"\\u0061" :\t{"dtype" : "F8_E4M3", "shape":[1],"data_offsets":[0,1] } }',
        '{"__metadata__":{},%s}',
        '{%s , "__metadata__" : {"b" : "{}", "c":"\\""} }',
    ],
)
def test_every_way_to_write_a_header_is_read(text: str) -> None:
    """JSON has spaces, escapes and any order, as json.loads has it."""
    text = text % MEMBER if "%s" in text else text
    header = header_of(struct.pack("<Q", len(text)) + text.encode() + b"x")
    assert set(header.tensors) == {"a"}
    assert header.metadata == json.loads(text).get("__metadata__", {})


@pytest.mark.parametrize(
    "text",
    ["{%s", "{%s,}", "{%s} x", "{%s,%s}", "{,%s}", "[%s]", '{%s,"b":3}', '{%s,"__metadata__":{"a":1}}',
     '{"__metadata__":{"a":"b"},"__metadata__":{"c":"d"},%s}', '{%s,"__metadata__":{"a":"b","a":"b"}}',
     '{%s,"b":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[1,1]}}', '{%s,"__metadata__":{"a":"b"'],
)  # fmt: skip
def test_no_other_text_is_taken_for_a_header(text: str) -> None:
    """What json.loads would refuse is refused, and so is a key that is there twice."""
    text = text.replace("%s", MEMBER)
    with pytest.raises(AdapterMalformedError):
        header_of(struct.pack("<Q", len(text)) + text.encode() + b"x")

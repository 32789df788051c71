"""The PEFT reader against files that peft itself wrote, and against files that nobody should have written."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import (
    AdapterError,
    AdapterIncompatibleError,
    AdapterMalformedError,
    AdapterRankTooLargeError,
)
from lora_server.models.base import adapter_targets
from lora_server.models.linear_store import linear_shapes
from lora_server.models.weights import AdapterWeights, linear_groups
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.factories import TinyNet, write_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.blocks.0.to_q"


def read(folder: Path, dtype: torch.dtype = torch.float64, max_rank: int = 64) -> AdapterWeights:
    """Reads a folder as the only component of a tiny model."""
    targets = adapter_targets({"net": TinyNet()})
    files = AdapterFolder(folder, ["net"], AdapterRoots([folder])).read(1 << 20)
    return AdapterReader(targets, "net", "tiny", dtype, max_rank).read(folder.name, files.contents)


def full_deltas(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    """The change of each adapted module at scale 1, by path."""
    groups = linear_groups(linear_shapes(TinyNet()))
    return {
        groups[delta.group].paths[member]: delta.b[k] @ delta.a[k]
        for delta in weights.groups["net"]
        for k, member in enumerate(delta.members)
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 3, "lora_alpha": 7},
        {"use_rslora": True},
        {"target_modules": ["to_q", "to_k"], "rank_pattern": {"to_k": 2}, "alpha_pattern": {"blocks.0.to_q": 5}},
        {"target_modules": r".*blocks\.0\.to_[qk]"},
        {"target_modules": ["to_q", "to_k"], "exclude_modules": ["blocks.1.to_q"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["conv", "to_q"], "rank_pattern": {"conv": 3}},
    ],
)
def test_deltas_equal_pefts_own(tmp_path: Path, config: dict[str, Any]) -> None:
    """scaling * B A is what peft's get_delta_weight says, for exactly the modules that peft adapted."""
    folder = write_adapter(tmp_path / "x", TinyNet(), **config)
    deltas = full_deltas(read(folder))
    oracle = PeftModel.from_pretrained(TinyNet(), folder).double()
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in oracle.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(deltas) == set(adapted)
    for path, module in adapted.items():
        expected = module.get_delta_weight("default").flatten(1)  # a convolution's kernel is one row of features
        torch.testing.assert_close(deltas[path], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_types_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Files of the three usual types are converted to the model's type."""
    folder = write_adapter(tmp_path / "x", TinyNet())
    rewrite(folder, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    assert read(folder, torch.float32).flat.dtype == torch.float32


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Changes the tensors of an adapter."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def edit(folder: Path, **changes: Any) -> None:
    """Changes the configuration of an adapter."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A change that leaves one tensor out."""
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def put(key: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A change that sets one tensor."""
    return lambda tensors: {**tensors, key: value}


A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
BAD_TENSORS: dict[str, tuple[Any, type[AdapterError], str]] = {
    "missing half": (drop(B), AdapterMalformedError, A),
    "a module left out": (
        lambda tensors: {key: value for key, value in tensors.items() if ".1." not in key},
        AdapterMalformedError,
        "blocks.1.to_q",
    ),
    "NaN": (put(A, torch.full((4, 6), float("nan"))), AdapterMalformedError, A),
    "infinity": (put(B, torch.full((6, 4), float("inf"))), AdapterMalformedError, B),
    "wrong width": (put(A, torch.ones(4, 7)), AdapterIncompatibleError, A),
    "wrong height": (put(B, torch.ones(9, 4)), AdapterIncompatibleError, B),
    "ranks disagree": (put(B, torch.ones(6, 3)), AdapterMalformedError, B),
    "integers": (put(A, torch.ones(4, 6, dtype=torch.int32)), AdapterMalformedError, A),
    "unknown module": (put("base_model.model.nope.lora_A.weight", torch.ones(4, 6)), AdapterIncompatibleError, "nope"),
    "a kernel for a linear": (put(A, torch.ones(4, 3, 1, 2)), AdapterIncompatibleError, A),
    "a full weight": (put("base_model.model.blocks.0.to_q.weight", torch.ones(6, 6)), AdapterMalformedError, "to_q"),
    "DoRA that the configuration does not know": (
        put(f"{PREFIX}.lora_magnitude_vector", torch.ones(6)),
        AdapterMalformedError,
        "magnitude",
    ),
    "nothing": (lambda tensors: {}, AdapterMalformedError, WEIGHTS),
}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA without magnitudes": ({"use_dora": True}, "use_dora"),
    "LoHa, but tensors of LoRA": ({"peft_type": "LOHA"}, "lora_A"),
    "a kind that is not read": ({"peft_type": "BONE"}, "peft_type"),
    "modules_to_save": ({"modules_to_save": ["conv"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, "bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "zero rank": ({"r": 0}, "r"),
    "another rank": ({"r": 5}, A),
    "alpha is text": ({"lora_alpha": "many"}, "lora_alpha"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "not these modules": ({"target_modules": ["to_k"]}, "to_"),
    "a feature of tomorrow": ({"use_quantum": True}, "use_quantum"),
    "a regular expression that backtracks": ({"target_modules": "(.*.*.*.*.*.*.*)*x"}, "to_q"),
    "no regular expression": ({"target_modules": "((("}, "target_modules"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_key(tmp_path: Path, case: str) -> None:
    """Whatever does not fit as a whole is refused, with the offending key in the message."""
    change, error, key = BAD_TENSORS[case]
    folder = write_adapter(tmp_path / "x", TinyNet())
    rewrite(folder, change)
    with pytest.raises(error) as caught:
        read(folder)
    assert key in caught.value.metadata["key"]


@pytest.mark.parametrize(
    ("key", "shape", "error"),
    [
        ("lora_A", (4, 3), AdapterIncompatibleError),
        ("lora_A", (4, 3, 2, 3), AdapterIncompatibleError),
        ("lora_B", (5, 4, 3, 3), AdapterMalformedError),
    ],
)
def test_another_kernel_is_refused(tmp_path: Path, key: str, shape: tuple[int, ...], error: type[AdapterError]) -> None:
    """A convolution's factors have its own kernel, and none."""
    folder = write_adapter(tmp_path / "x", TinyNet(), target_modules=["conv"])
    name = f"base_model.model.conv.{key}.weight"
    rewrite(folder, put(name, torch.ones(shape)))
    with pytest.raises(error) as caught:
        read(folder)
    assert caught.value.metadata["key"] == name


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_are_refused_by_field(tmp_path: Path, case: str) -> None:
    """What could change the result and is not understood is refused, with the field in the message."""
    changes, key = BAD_CONFIGS[case]
    folder = write_adapter(tmp_path / "x", TinyNet())
    edit(folder, **changes)
    with pytest.raises(AdapterMalformedError) as caught:
        read(folder)
    assert key in caught.value.metadata["key"]


def test_a_rank_over_the_limit_is_refused(tmp_path: Path) -> None:
    """The limit has its own reason."""
    with pytest.raises(AdapterRankTooLargeError):
        read(write_adapter(tmp_path / "x", TinyNet()), max_rank=3)


def test_values_beyond_the_models_type_are_refused(tmp_path: Path) -> None:
    """What becomes infinite in float16 is not loaded as infinity."""
    folder = write_adapter(tmp_path / "x", TinyNet())
    rewrite(folder, put(A, torch.full((4, 6), 1e6)))
    with pytest.raises(AdapterMalformedError, match="range"):
        read(folder, torch.float16)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """A folder with a .bin alone is refused, and says why."""
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(AdapterMalformedError, match="pickle"):
        read(tmp_path)


def hostile_header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file of nothing but a header."""
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        hostile_header(b"{}", 2**63),
        hostile_header(b"[" * 100_000),
        hostile_header(b'{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,4]}}'),
        hostile_header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + b"\0" * 4,
        hostile_header(b"\xff\xfe"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    """Headers that lie are a clear error, not a crash or an allocation."""
    folder = write_adapter(tmp_path / "x", TinyNet())
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterMalformedError):
        read(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_get_past_the_reader_with_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """Truncated or bit-flipped, a file is read as something valid or refused with a domain error."""
    folder = tmp_path / "x"
    if not folder.exists():
        write_adapter(folder, TinyNet())
        (folder / "w").write_bytes((folder / WEIGHTS).read_bytes())
        (folder / "c").write_bytes((folder / CONFIG).read_bytes())
    (folder / WEIGHTS).write_bytes((folder / "w").read_bytes())
    (folder / CONFIG).write_bytes((folder / "c").read_bytes())
    victim = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray((folder / victim).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / victim).write_bytes(content)
    with contextlib.suppress(AdapterError):
        read(folder)

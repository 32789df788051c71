"""Whatever shape and type a tensor has, in whatever role and dialect: a right load or a domain error, nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_server.adapters.formats.inspection import Inspection, Serving, model_of_folder
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.demo.paths import model_dir
from lora_server.errors import LoraServerError

from tests.unit.adapters.test_dialects import HIDDEN, targets

SHAPES: list[tuple[int, ...]] = [
    (), (0,), (1,), (4,), (HIDDEN,), (0, 0), (0, HIDDEN), (4, 0), (1, 1), (4, HIDDEN), (HIDDEN, 4), (HIDDEN, 1),
    (1, HIDDEN), (4, HIDDEN, 1), (4, HIDDEN, 1, 1), (HIDDEN, 4, 1, 1), (4, 4, 1, 1), (4, HIDDEN, 0, 1),
    (4, HIDDEN, 1, 1, 1), (1, 1, 1, 1, 1, 1),
]  # fmt: skip
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I8": 1, "U64": 8, "BOOL": 1,
    "C64": 8, "F4": 1, "F8_E8M0": 1, "": 1, "f32": 4,
}  # fmt: skip
LORA = {
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight"),
    "before peft": ("transformer.transformer_blocks.0.attn.to_q", "lora.down.weight", "lora.up.weight"),
    "processors": ("transformer.transformer_blocks.0.attn.processor.to_q_lora", "down.weight", "up.weight"),
    "kohya": ("lora_unet_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight"),
    "comfyui": ("diffusion_model.joint_blocks.0.x_block.attn.proj", "lora_A.weight", "lora_B.weight"),
    "text encoder": ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
    "joint of another": ("transformer.transformer_blocks.40.attn.to_q", "lora_A.weight", "lora_B.weight"),
    "unet": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "lora_A.weight", "lora_B.weight"),
    "flux": ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_A.weight", "lora_B.weight"),
}
BESIDE = [
    "alpha", "lora.alpha", "lora_A.alpha", "lora_alpha", "lora_down.alpha", "lora_A.weight.alpha", "dora_scale",
    "lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude", "lora_mid.weight", "hada_t1", "lokr_t2",
    "lokr_w1", "hada_w1_a", "diff", "diff_b", "lora_B.bias", "rank", "lora_A.default.weight", "_orig_mod.alpha",
]  # fmt: skip
KINDS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale"),
    "lokr": (
        "lokr_w1",
        "lokr_w2",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "alpha",
        "dora_scale",
    ),
}


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> Path:
    """A file of zeros, by hand: no library writes such types and shapes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


@pytest.fixture(scope="module")
def loader() -> AdapterLoader:
    """For the embedded model."""
    return AdapterLoader(
        AdapterRoots([Path("/")]), targets(), ("demo", "sd3", "transformer"), torch.float32, LimitsConfig()
    )


SERVING = Serving(dataclasses.replace(model_of_folder(model_dir()), name="demo"))


T = TypeVar("T")


def outcome(work: Callable[[], T]) -> tuple[T | None, str]:
    """What *work* returns, or the reason and the sentence of the domain error that it raises."""
    try:
        return work(), ""
    except LoraServerError as error:
        return None, f"{error.reason}: {error}"


def check(loader: AdapterLoader, place: Path) -> None:
    """Strictly and in part: it is read, and then changes nothing since all is zero, or a domain error says why not.

    A report without a server says the same.
    """
    for load, allow_partial in ((loader.load, False), (loader.load_partial, True)):
        loaded, refusal = outcome(partial(load, place))
        assert loaded is not None or (refusal.startswith("ADAPTER_") and len(refusal) < 2000)
        groups = {} if loaded is None else loaded.weights.groups  # type: ignore[attr-defined]
        for delta in (each for found in groups.values() for each in found):
            assert not any((b @ a).any() for b, a in zip(delta.b, delta.a, strict=True))
        inspect = partial(Inspection, place, SERVING, allow_partial=allow_partial)
        report, same = outcome(lambda inspect=inspect: inspect().report())
        assert same == refusal
        assert report is None or loaded is None or dataclasses.replace(loaded.report, digest="") == report
        told = refusal if report is None else dataclasses.asdict(report)
        json.dumps(told, ensure_ascii=False).encode()  # it can be sent, and written down


ODD_NAMES = ["\ud800x", "\udcff", "\x1b[31mred", "a\nb", "a\u202eb", "a b", "模型", "&#", "'\"", "x" * 600, "."]


@pytest.mark.parametrize("odd", ODD_NAMES, ids=ascii)
def test_odd_names(loader: AdapterLoader, tmp_path: Path, odd: str) -> None:
    """In keys, in what the header says, and in the patterns of a configuration: nothing that cannot be sent."""
    name, down, up = LORA["diffusers"]
    right = {f"{name}.{down}": ("F32", (4, HIDDEN)), f"{name}.{up}": ("F32", (HIDDEN, 4))}
    for key in (odd, f"transformer.{odd}.lora_A.weight", f"bundle_emb.{odd}.clip_l"):
        check(loader, write(tmp_path / "x.safetensors", {**right, key: ("F32", (4, HIDDEN))}))
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {odd: 3}})
    said = ("modelspec.architecture", "modelspec.title", "modelspec.trigger_phrase", "ss_output_name", odd)
    check(loader, write(tmp_path / "x.safetensors", right, dict.fromkeys(said, odd)))
    check(loader, write(tmp_path / "x.safetensors", right, {"lora_adapter_metadata": config}))


@pytest.mark.parametrize("name", [b"\xff_emb.safetensors", b"\x1b[31m.safetensors", b"a\nb_emb.safetensors"])
def test_odd_names_beside(loader: AdapterLoader, tmp_path: Path, name: bytes) -> None:
    """Of what lies beside the weights, which no system holds to any encoding."""
    first, down, up = LORA["diffusers"]
    right = {f"{first}.{down}": ("F32", (4, HIDDEN)), f"{first}.{up}": ("F32", (HIDDEN, 4))}
    folder = write(tmp_path / "x" / "pytorch_lora_weights.safetensors", right).parent
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")
    check(loader, folder)
    report = loader.load_partial(folder).report
    assert report is not None
    assert report.warnings[0].isprintable()


@pytest.mark.parametrize("dialect", LORA)
@pytest.mark.parametrize("role", ["down", "up"])
def test_factors(loader: AdapterLoader, tmp_path: Path, dialect: str, role: str) -> None:
    """Every shape for one half, the other half being right."""
    name, down, up = LORA[dialect]
    right = {f"{name}.{down}": ("F32", (4, HIDDEN)), f"{name}.{up}": ("F32", (HIDDEN, 4))}
    for shape in SHAPES:
        check(
            loader,
            write(tmp_path / "x.safetensors", {**right, f"{name}.{down if role == 'down' else up}": ("F32", shape)}),
        )


@pytest.mark.parametrize("suffix", BESIDE)
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "unet"])
def test_what_stands_beside_factors(loader: AdapterLoader, tmp_path: Path, dialect: str, suffix: str) -> None:
    """Alphas, magnitudes and what is spelled like them, of every shape."""
    name, down, up = LORA[dialect]
    right = {f"{name}.{down}": ("F32", (4, HIDDEN)), f"{name}.{up}": ("F32", (HIDDEN, 4))}
    for shape in SHAPES:
        check(loader, write(tmp_path / "x.safetensors", {**right, f"{name}.{suffix}": ("F32", shape)}))


@pytest.mark.parametrize("dtype", SIZES)
def test_types(loader: AdapterLoader, tmp_path: Path, dtype: str) -> None:
    """Every type, known to the format or not, for a factor, an alpha and magnitudes."""
    name, down, up = LORA["kohya"]
    right = {f"{name}.{down}": ("F32", (4, HIDDEN)), f"{name}.{up}": ("F32", (HIDDEN, 4))}
    for suffix, shape in ((down, (4, HIDDEN)), ("alpha", ()), ("alpha", (1,)), ("dora_scale", (HIDDEN, 1))):
        check(loader, write(tmp_path / "x.safetensors", {**right, f"{name}.{suffix}": (dtype, shape)}))


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(loader: AdapterLoader, tmp_path: Path, kind: str) -> None:
    """Each tensor of LoHa and LoKr, alone and with the others, in every shape."""
    name = LORA["kohya"][0]
    for suffix, shape in itertools.product(KINDS[kind], SHAPES):
        check(loader, write(tmp_path / "x.safetensors", {f"{name}.{suffix}": ("F32", shape)}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture(loader: AdapterLoader, tmp_path: Path, data: st.DataObject) -> None:
    """Tensors of all roles, shapes and types together."""
    suffixes = [*BESIDE, *KINDS["loha"], *KINDS["lokr"], "lora_A.weight", "lora_B.weight", "lora_down.weight"]
    names = [name for name, _, _ in LORA.values()]
    keys = st.builds(lambda name, suffix: f"{name}.{suffix}", st.sampled_from(names), st.sampled_from(suffixes))
    kinds = st.tuples(st.sampled_from([*SIZES]), st.sampled_from(SHAPES))
    tensors = data.draw(st.dictionaries(keys, kinds, min_size=1, max_size=6))
    check(loader, write(tmp_path / "x.safetensors", tensors))


VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 2**31, 10**300, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "4",
    "to_q", "(", "all-linear", [], [4], ["to_q"], [None], [[]], {}, {"to_q": 4}, {"to_q": None}, {"to_q": "x"},
    {"(": 4}, {"": 4}, {"to_q": {"a": []}}, [[[[[]]]]], "x" * 5000,
]  # fmt: skip
FIELDS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "base_model_name_or_path",
    "modules_to_save", "trainable_token_indices", "target_parameters", "loftq_config", "something_new",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("where", ["folder", "header"])
def test_configurations(loader: AdapterLoader, tmp_path: Path, field: str, where: str) -> None:
    """Every field of a PEFT configuration with values of every type, beside the file and in diffusers' header."""
    tensors = {f"transformer.{k}": v for k, v in _peft_tensors().items()}
    for value in VALUES:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["attn.to_q"], field: value}
        if where == "folder":
            place = write(tmp_path / "x" / "adapter_model.safetensors", tensors).parent
            (place / "adapter_config.json").write_text(json.dumps(config))
        else:
            text = json.dumps({f"transformer.{key}": each for key, each in config.items()})
            place = write(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": text})
        check(loader, place)


def _peft_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    names = [f"transformer_blocks.{block}.attn.to_q" for block in range(6)]
    return {
        f"{name}.lora_{half}.weight": ("F32", (4, HIDDEN) if half == "A" else (HIDDEN, 4))
        for name in names
        for half in "AB"
    }


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{" * 5000,
        '{"transformer":',
        "null",
        "[]",
        "3",
        '"x"',
        '{"transformer.r": 1e999}',
        '{"": 1}',
        '{".": 1}',
    ],
)
def test_headers_configurations_that_are_none(loader: AdapterLoader, tmp_path: Path, text: str) -> None:
    """Deep, cut short or no object: said by name."""
    tensors = {f"transformer.{k}": v for k, v in _peft_tensors().items()}
    check(loader, write(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": text}))
    place = write(tmp_path / "x" / "adapter_model.safetensors", tensors).parent
    (place / "adapter_config.json").write_text(text)
    check(loader, place)

"""`inspect` says what the server says: the same verdict, reason, sentence and report, accepted or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.adapters.formats.inspection import Inspection, Serving, model_of_folder
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.cli import app
from lora_server.config import LimitsConfig, ModelConfig
from lora_server.demo.paths import adapters_dir, model_dir
from lora_server.models.base import ModelFamily, adapter_targets
from lora_server.models.registry import load_model
from lora_server.types import LoadReport
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.dialects import kohya, write_lora
from tests.parity import tiny_flow
from tests.parity.subjects_unet import SD1, SD2, SDXL
from tests.unit.adapters.test_dialects import own_modules, sd3_modules, targets
from tests.unit.adapters.test_odd_tensors import outcome

Q = "transformer_blocks.{}.attn.to_q"
Tensors = dict[str, torch.Tensor]


def lora(
    *names: str, width: int = 160, rank: int = 4, value: float = 0.1, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Both halves of *names*."""
    down = {f"{name}.lora_A.weight": torch.full((rank, width), value, dtype=dtype) for name in names}
    return down | {f"{name}.lora_B.weight": torch.full((width, rank), 0.1, dtype=dtype) for name in names}


def bare(tensors: Tensors, **metadata: str) -> Callable[[Path], Path]:
    """A bare file."""

    def write(folder: Path) -> Path:
        save_file(tensors, folder / "x.safetensors", {key.replace("__", "."): value for key, value in metadata.items()})
        return folder / "x.safetensors"

    return write


def peft(
    parts: Mapping[str, tuple[Tensors, Mapping[str, Any]]], files: Mapping[str, bytes] | None = None
) -> Callable[[Path], Path]:
    """PEFT's files by sub-folder, and others."""

    def write(folder: Path) -> Path:
        for name, (tensors, config) in parts.items():
            (folder / name).mkdir(exist_ok=True)
            save_file(
                {f"base_model.model.{k}": v for k, v in tensors.items()}, folder / name / "adapter_model.safetensors"
            )
            fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
            (folder / name / "adapter_config.json").write_text(json.dumps(fields))
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        return folder

    return write


def raw(data: bytes) -> Callable[[Path], Path]:
    """A file of these bytes."""

    def write(folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(data)
        return folder / "x.safetensors"

    return write


def tensors_of(name: str) -> Tensors:
    """Kohya's file of a kind."""
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    if name == "loha":
        return {
            f"{key}.hada_{half}": torch.full((480, 16) if half.endswith("a") else (16, 160), 0.1)
            for half in ("w1_a", "w1_b", "w2_a", "w2_b")
        }
    if name == "lokr":
        return {f"{key}.lokr_w1": torch.ones(24, 16), f"{key}.lokr_w2": torch.ones(20, 10)}
    shape = {"dora": (480, 1), "dora of another size": (481, 1), "dora along the input": (1, 160)}[name]
    return {
        f"{key}.lora_down.weight": torch.ones(4, 160),
        f"{key}.lora_up.weight": torch.ones(480, 4),
        f"{key}.dora_scale": torch.ones(shape),
    }


ALL_Q = [Q.format(n) for n in range(6)]
BOTH_TEXT = [f"text_model.encoder.layers.{n}.self_attn.q_proj" for n in range(2)]
TEXT_TARGETED = {"target_modules": ["q_proj"]}
TARGETED = {"target_modules": ["attn.to_q"]}
GOOD = {"": (lora(*ALL_Q), TARGETED)}
LAST_INFINITE = lora(ALL_Q[5], value=float("-inf"), dtype=torch.float16)
ODD_CARD = b"---\ntrigger: {a: [1]}\nlora_scale: [x]\n---"
ODD_TAGS = '{"a": {"b": 1e999, "c": "d"}, "e": [], "f": {"g": true, "h": -1}}'
SOME = lora(f"transformer.{ALL_Q[0]}")
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, int]]] = {
    "kohya": (bare(write_lora(sd3_modules(), kohya("lora_unet")).tensors, ss_output_name="x"), {}),
    "text encoders": (bare(write_lora(own_modules("text_encoder", "q_proj", "fc1"), kohya("lora_te1")).tensors), {}),
    "loha": (bare(tensors_of("loha")), {}),
    "lokr": (bare(tensors_of("lokr")), {}),
    "dora": (bare(tensors_of("dora")), {}),
    "dora of another size": (bare(tensors_of("dora of another size")), {}),
    "dora along the input": (bare(tensors_of("dora along the input")), {}),
    "peft": (peft(GOOD), {}),
    "peft with text encoders": (peft(GOOD | {"text_encoder": (lora(*BOTH_TEXT, width=48), TEXT_TARGETED)}), {}),
    "peft, text encoder in part": (peft({"text_encoder": (lora(BOTH_TEXT[0], width=48), TEXT_TARGETED)}), {}),
    "pruned": (peft({"": (lora(*ALL_Q[:3]), TARGETED)}), {}),
    "not targeted": (peft({"": (lora(*ALL_Q), {"target_modules": ["attn.to_k"]})}), {}),
    "ranks contradict": (peft({"": (lora(*ALL_Q), TARGETED | {"rank_pattern": {ALL_Q[0]: 2}})}), {}),
    "pattern of nothing": (peft({"": (lora(*ALL_Q), TARGETED | {"alpha_pattern": {"nothing": 2}})}), {}),
    "pissa": (peft({"": (lora(*ALL_Q), TARGETED | {"init_lora_weights": "pissa"})}), {}),
    "a component too many": (peft(GOOD | {"text_encoder_9": (lora(ALL_Q[0]), TARGETED)}), {}),
    "embeddings beside": (peft(GOOD, {"my_emb.safetensors": b"x"}), {}),
    "a card that is wrong": (peft(GOOD, {"lora_inference.json": b'{"trigger_words": 3}'}), {}),
    "cards of odd types": (peft(GOOD, {"README.md": ODD_CARD, "adapter_model.json": b"[3]"}), {}),
    "words of odd types": (bare(SOME, ss_tag_frequency=ODD_TAGS, modelspec__trigger_phrase="\x1b[31m"), {}),
    "one module of another": (bare(SOME | lora("transformer.elsewhere.to_q")), {}),
    "one tensor of no kind": (bare(SOME | {f"transformer.{ALL_Q[0]}.w_norm": torch.ones(4)}), {}),
    "another model's header": (bare(SOME, modelspec__architecture="flux-1-dev/lora"), {}),
    "a header that nobody knows": (bare(SOME, ss_base_model_version="brand-new"), {}),
    "another model's keys": (bare(SOME | lora("transformer.single_transformer_blocks.0.attn.to_q", width=3072)), {}),
    "another width": (bare(lora(f"transformer.{ALL_Q[0]}", width=64)), {}),
    "half missing": (bare({f"transformer.{ALL_Q[0]}.lora_A.weight": torch.ones(4, 160)}), {}),
    "peft's names alone": (bare(lora(f"base_model.model.{ALL_Q[0]}")), {}),
    "rank": (bare(lora(f"transformer.{ALL_Q[0]}", rank=8)), {"max_rank": 7}),
    "merged since the rank is small": (bare(tensors_of("loha")), {"max_rank": 16}),
    "modules": (peft(GOOD), {"max_adapter_modules": 5}),
    "header": (peft(GOOD), {"max_adapter_header_bytes": 200}),
    "tensors": (peft(GOOD), {"max_adapter_tensors": 3}),
    "file": (peft(GOOD), {"max_adapter_file_bytes": 400}),
    "a huge configuration": (peft({"": (lora(*ALL_Q), TARGETED | {"revision": "x" * 400_000})}), {}),
    "empty": (raw(b""), {}),
    "no safetensors": (raw(b"hello, world"), {}),
    "no folder of an adapter": (lambda folder: folder, {}),
    "NaN": (bare(lora(f"transformer.{ALL_Q[0]}", value=float("nan"))), {}),
    "infinity in bfloat16": (bare(lora(f"transformer.{ALL_Q[0]}", value=float("inf"), dtype=torch.bfloat16)), {}),
    "NaN in float8": (bare(lora(f"transformer.{ALL_Q[0]}", value=float("nan"), dtype=torch.float8_e4m3fn)), {}),
    "infinity in float16, in PEFT": (peft({"": (lora(*ALL_Q[:5]) | LAST_INFINITE, TARGETED)}), {}),
}  # fmt: skip
DEMO = dataclasses.replace(model_of_folder(model_dir()), name="demo")


def inspected(place: Path, serving: Serving, *, allow_partial: bool) -> LoadReport:
    """All that the command finds out."""
    found = Inspection(place, serving, allow_partial=allow_partial)
    return dataclasses.replace(found.report(), digest=found.digest())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("allow_partial", [False, True])
def test_inspection_and_load_say_the_same(tmp_path: Path, case: str, allow_partial: bool) -> None:
    """Word by word."""
    write, given = CASES[case]
    place, limits = write(tmp_path), LimitsConfig(**given)
    loader = AdapterLoader(AdapterRoots([tmp_path]), targets(), ("demo", "sd3", "transformer"), torch.float32, limits)
    located, refusal = outcome(partial(loader.locate, str(place)))
    assert located is not None, refusal
    loaded, refusal = outcome(partial(loader.load_partial if allow_partial else loader.load, located))
    report, same = outcome(partial(inspected, place, Serving(DEMO, limits), allow_partial=allow_partial))
    assert same == refusal
    assert report == (loaded.report if loaded is not None else None)


@pytest.mark.parametrize("case", ["kohya", "pruned", "another model's header", "rank", "NaN", "embeddings beside"])
def test_the_command_says_it(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code, sentence and reason; with the limits of the environment."""
    write, given = CASES[case]
    place = write(tmp_path)
    for name, value in given.items():
        monkeypatch.setenv(f"LORA_SERVER_LIMITS_{name.upper()}", str(value))
    serving = Serving(DEMO, LimitsConfig(**given))
    report, refusal = outcome(partial(inspected, place, serving, allow_partial=False))
    shown = CliRunner().invoke(app, ["inspect", str(place), "--model", "demo", "--json"])
    fields = json.loads(shown.stdout)
    assert shown.exit_code == (0 if report is not None else 1)
    assert (fields["refused"] is None) == (report is not None)
    if report is not None:
        assert fields["digest"] == report.digest
    else:
        assert f"{fields['refused']['reason']}: {fields['refused']['message']}" == refusal
        assert refusal.partition(": ")[2] in shown.stderr
        text = CliRunner().invoke(app, ["inspect", str(place), "--model", "demo"])
        assert (text.exit_code, text.stderr) == (1, shown.stderr)


def test_the_bundled_adapters_are_fine() -> None:
    """As the demo loads them."""
    for folder in sorted(adapters_dir().iterdir()):
        assert CliRunner().invoke(app, ["inspect", str(folder), "--model", "demo"]).exit_code == 0


MODELS: dict[str, Callable[[Path], object]] = {
    "flux": tiny_flow.build_flux,
    "qwen-image": tiny_flow.build_qwen_image,
    "z-image": tiny_flow.build_z_image,
    "no family": tiny_flow.build_pixart,
    "sd1": SD1.build,
    "sd2": SD2.build,
    "sdxl": SDXL.build,
}


@pytest.mark.parametrize("case", MODELS)
def test_the_model_is_the_one_that_a_server_would_have(tmp_path: Path, case: str) -> None:
    """Its name, family, denoiser, and every module that adapters may change."""
    MODELS[case](tmp_path / "model")
    family: ModelFamily = load_model(ModelConfig(model=str(tmp_path / "model"), device="cpu"))
    expected = {
        component: {path: (each.out_features, each.in_features, each.kernel or (1, 1)) for path, each in shapes.items()}
        for component, shapes in adapter_targets(family.components).items()
    }
    model = model_of_folder(tmp_path / "model")
    assert (model.name, model.family, model.denoiser) == (family.info.name, family.info.family, family.denoiser)
    assert model.catalog == expected


def test_clip_of_transformers_4(tmp_path: Path) -> None:
    """A folder as the hub has it: the files say `text_model.`, the loaded module does not."""
    SD1.build(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    bare_names = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    save_file({f"text_model.{key}": value for key, value in bare_names.items()}, file, {"format": "pt"})
    family = load_model(ModelConfig(model=str(tmp_path), device="cpu"))
    catalog = model_of_folder(tmp_path).catalog
    assert catalog is not None
    assert set(catalog["text_encoder"]) == set(adapter_targets(family.components)["text_encoder"])

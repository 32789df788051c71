"""What is understood of a file is told: the report, the limits, what is left out, and the same without a server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_server import inspect_command
from lora_server.adapters.formats.facts import read_facts
from lora_server.adapters.formats.header import Limits
from lora_server.adapters.formats.inspection import Inspection, Serving, model_of_folder
from lora_server.adapters.formats.peft_config import IRRELEVANT, KINDS, UNDERSTOOD
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.formats.report import make_report
from lora_server.adapters.formats.sources import source_files
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.cli import app
from lora_server.config import LimitsConfig
from lora_server.demo.paths import adapters_dir, model_dir
from lora_server.errors import (
    AdapterError,
    AdapterFileTooLargeError,
    AdapterHeaderTooLargeError,
    AdapterIncompatibleError,
    AdapterMalformedError,
    AdapterRankTooLargeError,
    AdapterTooManyModulesError,
    AdapterTooManyTensorsError,
    LoraServerError,
)
from lora_server.models.base import adapter_targets
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import save
from typer.testing import CliRunner

from tests.conftest import BIN
from tests.dialects import Written, dotted, kohya, write_lora
from tests.factories import TinyNet
from tests.unit.adapters.test_dialects import components

MODULES = {"blocks.0.to_q": (6, 6), "blocks.0.to_k": (8, 6)}


def loader(root: Path, **limits: int) -> AdapterLoader:
    """A loader for a tiny model."""
    targets = adapter_targets({"transformer": TinyNet()})
    return AdapterLoader(
        AdapterRoots([root]), targets, ("tiny", "", "transformer"), torch.float32, LimitsConfig(**limits)
    )


def written(*extra: str) -> Written:
    """A Kohya file of two modules, with *extra* tensors."""
    file = write_lora(MODULES, kohya("lora_unet"), rank_of=lambda m: 2 if "to_q" in m else 4)
    file.tensors |= {key: torch.ones(1) for key in extra}
    return file


METADATA = {
    "ss_base_model_version": "sd3.5-medium",
    "ss_output_name": "my style",
    "ss_tag_frequency": json.dumps({"10_style": {"mystyle": 20, "a cat": 3, "painting": 12}}),
}


def test_a_bare_file_is_an_adapter_and_its_digest_its_sha256sum(tmp_path: Path) -> None:
    """What sha256sum prints is what the server lists; the report says what was understood."""
    path = written().save(tmp_path / "x.safetensors", METADATA)
    loaded = loader(tmp_path).load(loader(tmp_path).locate(str(path)))
    data = path.read_bytes()
    assert loaded.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    report = loaded.report
    assert report is not None
    assert (report.dialect, report.kinds, report.merged_only) == ("kohya", ("lora",), False)
    assert (report.min_rank, report.max_rank, report.min_alpha, report.max_alpha) == (2, 4, 2.0, 2.0)
    assert [(each.name, each.num_modules) for each in report.components] == [("transformer", 2)]
    assert (report.size_bytes, report.digest) == (len(data), loaded.digest)
    assert (report.base_model, report.title) == ("sd3.5-medium", "my style")
    assert report.trigger_words == ("mystyle", "painting")


def test_the_only_safetensors_of_a_folder_is_the_adapter(tmp_path: Path) -> None:
    """One is taken; of several, one has to be named."""
    folder = tmp_path / "style"
    written().save(folder / "weights.safetensors")
    (folder / "README.md").write_text("---\nbase_model: me/mine\ninstance_prompt: 'sks style'\n---\n# Card\n")
    report = loader(tmp_path).load(folder).report
    assert report is not None
    assert (report.base_model, report.trigger_words) == ("me/mine", ("sks style",))
    written().save(folder / "second.safetensors")
    with pytest.raises(AdapterMalformedError, match="name one of them"):
        loader(tmp_path).load(folder)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    """A .ckpt is never opened, and the error says what to do."""
    (tmp_path / "x.ckpt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(AdapterMalformedError, match="pickle"):
        loader(tmp_path).locate(str(tmp_path / "x.ckpt"))


STRAYS = {
    "a module that the model has not": ("lora_unet_blocks_9_to_q.lora_down.weight", AdapterIncompatibleError),
    "a tensor of no known kind": ("lora_unet_blocks_0_to_q.w_norm", AdapterMalformedError),
}


@pytest.mark.parametrize("case", STRAYS)
def test_one_unmatched_key_fails_unless_it_is_allowed(tmp_path: Path, case: str) -> None:
    """Strict by default, with the key named; a partial load says what it left out, and keeps the rest."""
    key, error = STRAYS[case]
    path = written(key).save(tmp_path / "x.safetensors")
    with pytest.raises(error) as refused:
        loader(tmp_path).load(path)
    assert refused.value.metadata["key"] == key
    loaded = loader(tmp_path).load_partial(path)
    assert loaded.report is not None
    assert (loaded.report.num_unmatched_keys, loaded.report.unmatched_keys) == (1, (key,))
    assert loaded.report.components[0].num_modules == 2


def test_a_partial_load_needs_something_to_load(tmp_path: Path) -> None:
    """A file of another model does not become an adapter that does nothing."""
    other = write_lora({"elsewhere": (4, 4)}, kohya("lora_unet"))
    with pytest.raises(AdapterIncompatibleError, match="no tensor"):
        loader(tmp_path).load_partial(other.save(tmp_path / "x.safetensors"))


def test_pefts_weights_without_their_configuration_are_refused(tmp_path: Path) -> None:
    """PEFT's alpha is in the configuration alone: guessing it would change the picture."""
    name_of = dotted("base_model.model.", "lora_A", "lora_B")
    file = write_lora(MODULES, name_of, alpha_of=lambda _: None)
    with pytest.raises(AdapterMalformedError, match=r"adapter_config\.json"):
        loader(tmp_path).load(file.save(tmp_path / "x.safetensors"))


LIMITS: dict[str, tuple[dict[str, int], type[LoraServerError]]] = {
    "file": ({"max_adapter_file_bytes": 100}, AdapterFileTooLargeError),
    "header": ({"max_adapter_header_bytes": 100}, AdapterHeaderTooLargeError),
    "tensors": ({"max_adapter_tensors": 5}, AdapterTooManyTensorsError),
    "modules": ({"max_adapter_modules": 1}, AdapterTooManyModulesError),
    "rank": ({"max_rank": 3}, AdapterRankTooLargeError),
}


@pytest.mark.parametrize("case", LIMITS)
def test_each_limit_has_its_own_reason(tmp_path: Path, case: str) -> None:
    """One more than allowed is refused, and the reason says which limit it was."""
    limits, error = LIMITS[case]
    path = written().save(tmp_path / "x.safetensors")
    loader(tmp_path).load(path)
    with pytest.raises(error):
        loader(tmp_path, **limits).load(path)


HOSTILE: dict[str, dict[str, object]] = {
    "overlap": {"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [0, 4])},
    "gap": {"a": ("F32", [1], [4, 8])},
    "negative": {"a": ("F32", [-1], [0, 4])},
    "no number": {"a": ("F32", ["1"], [0, 4])},
    "type": {"a": ("F3", [1], [0, 4])},
    "long name": {"a" * 600: ("F32", [2], [0, 8])},
    "metadata": {"__metadata__": 3, "a": ("F32", [2], [0, 8])},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    """Every offset is checked before a byte is taken for a number."""
    header = {
        key: dict(zip(("dtype", "shape", "data_offsets"), value, strict=True)) if isinstance(value, tuple) else value
        for key, value in HOSTILE[case].items()
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(8)
    with pytest.raises(AdapterMalformedError):
        source_files("x", {"x.safetensors": data}, "transformer", Limits())


KINDS_OF_FILES = {
    "lora": {"lora_up.weight": (6, 2), "lora_down.weight": (2, 6), "alpha": ()},
    "loha": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 6), "hada_w2_a": (6, 2), "hada_w2_b": (2, 6)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 3), "dora_scale": (6, 1)},
}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_as_something_valid_or_refused(data: st.DataObject) -> None:
    """Cut short, with bits flipped in header and numbers, no kind of file gets past the reader with another error."""
    name = "lora_unet_blocks_0_to_q"
    kind = KINDS_OF_FILES[data.draw(st.sampled_from(sorted(KINDS_OF_FILES)))]
    content = bytearray(save({f"{name}.{key}": torch.ones(shape) for key, shape in kind.items()}, METADATA))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    reader = AdapterReader(adapter_targets({"transformer": TinyNet()}), "transformer", "tiny", torch.float32, 64)
    with contextlib.suppress(AdapterError):
        read = reader.read_planned("x", {"x.safetensors": bytes(content)}, allow_partial=data.draw(st.booleans()))
        make_report("x", read.layout, ("sha256:0", len(content)), {})


def test_facts_of_other_sources() -> None:
    """A1111's sidecar has trigger words and a scale; what is broken is passed over."""
    sidecar = json.dumps({"activation text": "glow", "preferred weight": 0.7, "sd version": "SDXL"}).encode()
    facts = read_facts("x", [], {"x.json": sidecar, "README.md": b"---\nbase_model:\n- a/b\n---"})
    assert (facts.trigger_words, facts.suggested_scale, facts.base_model) == (("glow",), 0.7, "SDXL")
    assert read_facts("x", [], {"x.json": b"[", "README.md": b"---\nbase_model:\n- 'a/b'\n---"}).base_model == "a/b"
    assert read_facts("x", [], {"x.json": b'{"preferred weight": 0}'}).suggested_scale is None


def test_inspection_knows_the_modules_of_a_model_from_its_headers() -> None:
    """Every linear and convolution of the loaded model, with its shape, and nothing that adapters cannot change."""
    catalog = model_of_folder(model_dir()).catalog
    assert catalog is not None
    for component, module in components().items():
        shapes = {
            path: (each.weight.shape[0], each.weight[0].numel(), getattr(each, "kernel_size", (1, 1)))
            for path, each in module.named_modules()
            if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
        }
        assert catalog[component] == shapes


def test_inspection_says_what_the_loader_says(tmp_path: Path) -> None:
    """The report of headers alone is the report of a load."""
    from tests.unit.adapters.test_dialects import sd3_modules, targets

    path = write_lora(sd3_modules(), kohya("lora_unet")).save(tmp_path / "x.safetensors", METADATA)
    (tmp_path / "x.json").write_text('{"preferred weight": "0.5"}')
    loading = AdapterLoader(
        AdapterRoots([tmp_path]), targets(), ("demo", "sd3", "transformer"), torch.float32, LimitsConfig()
    )
    inspection = Inspection(path, Serving(model_of_folder(model_dir())))
    inspected = inspection.report()
    assert dataclasses.replace(inspected, digest=inspection.digest()) == loading.load(path).report
    assert inspected.suggested_scale == 0.5
    alone = Inspection(path).report()
    assert dataclasses.replace(alone, components=inspected.components) == inspected


def test_inspect_takes_less_than_a_second(tmp_path: Path) -> None:
    """Of a large file too: of its tensors it reads nothing, but for the digest; counted in the processor's time."""
    up, down = torch.ones(4608, 16), torch.ones(16, 1536)
    names = [f"lora_unet_joint_blocks_{n}_x_block_attn_qkv" for n in range(150)]
    tensors = {f"{name}.lora_up.weight": up.clone() for name in names}
    tensors |= {f"{name}.lora_down.weight": down.clone() for name in names}
    path = Written(tensors).save(tmp_path / "x.safetensors")
    assert path.stat().st_size > 50e6
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([BIN / "lora-server", "inspect", path], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_inspect_prints_before_it_reads_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes take seconds to hash: everything else is there by then."""

    def slow(*_: object) -> str:
        raise AdapterMalformedError("x", "still reading")

    monkeypatch.setattr(inspect_command.Inspection, "digest", slow)
    path = written().save(tmp_path / "x.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert "rank" in shown.stdout
    assert "still reading" in shown.stderr


def test_inspect_prints_and_needs_no_torch(tmp_path: Path) -> None:
    """The command tells what an adapter is, as text and as JSON, and imports nothing heavy to do so."""
    command = [BIN / "lora-server", "inspect", adapters_dir() / "neon", "--model", "demo"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "transformer" in shown
    assert json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)["dialect"] == "peft"
    path = written("strange").save(tmp_path / "x.safetensors")
    refused = subprocess.run([BIN / "lora-server", "inspect", path, "--model", "demo"], capture_output=True, text=True)
    assert refused.returncode == 1
    code = (
        "import sys, lora_server.cli; print({'torch', 'peft', 'diffusers', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, LoKrConfig])
def test_every_field_of_pefts_configurations_is_understood_refused_or_irrelevant(config: type) -> None:
    """A field that peft sets by default, in a version to come, cannot slip through: it is refused until it is known."""
    fields = {name: value for name, value in config().to_dict().items() if value and name != "bias"}
    assert set(fields) - {"init_lora_weights"} <= UNDERSTOOD | IRRELEVANT
    assert str(config().peft_type.value) in KINDS

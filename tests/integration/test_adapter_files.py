"""Files of the wild through the whole service: loaded by path, reported, left out on request, and drawn with."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
from lora_client import GenerationOptions, LoraClient
from lora_client.errors import AdapterIncompatibleError, AdapterNotFoundError

from tests.conftest import BIN
from tests.dialects import kohya, write_lora

MODULES = {"joint_blocks.0.x_block.attn.qkv": (480, 160), "final_layer.adaLN_modulation.1": (320, 160)}
STRAY = "lora_unet_joint_blocks_99_x_block_attn_qkv.lora_down.weight"
QUICK = GenerationOptions(num_inference_steps=3)


@pytest.fixture
def client(server_address: str) -> LoraClient:
    """A client of the session's server."""
    return LoraClient(server_address, timeout_s=60)


def test_a_bare_kohya_file_is_loaded_reported_and_drawn_with(client: LoraClient, demo_adapters: Path) -> None:
    """One path is enough: the dialect is found out, the report comes back, and the picture changes."""
    path = demo_adapters / "wild.safetensors"
    write_lora(MODULES, kohya("lora_unet")).save(path, {"ss_base_model_version": "sd3.5-medium"})
    adapter = client.adapters.load(str(path), name="wild")
    assert adapter.current_digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    report = client.adapters.get("wild").current.report
    assert report is not None
    assert report == adapter.current.report
    assert (report.dialect, report.kinds, report.base_model) == ("kohya", ("lora",), "sd3.5-medium")
    assert [(each.name, each.num_modules) for each in report.components] == [("transformer", 4)]
    base = client.generate("a ring", seed=1, options=QUICK).images[0].data
    assert client.generate("a ring", seed=1, adapters=["wild:3"], options=QUICK).images[0].data != base


def test_what_has_no_module_is_left_out_only_on_request(
    client: LoraClient, server_address: str, demo_adapters: Path
) -> None:
    """Strict by default, the key in the error; allowed, the report names it, and a strict load still refuses."""
    path = demo_adapters / "partial.safetensors"
    written = write_lora(MODULES, kohya("lora_unet"))
    written.tensors[STRAY] = torch.zeros(4, 160)
    written.save(path)
    with pytest.raises(AdapterIncompatibleError) as refused:
        client.adapters.load(str(path), name="partial")
    assert refused.value.metadata["key"] == STRAY
    with pytest.raises(AdapterNotFoundError):
        client.adapters.get("partial")
    command = [BIN / "lora-client", "--server", server_address, "adapters", "load", path, "--name", "partial"]
    shown = subprocess.run([*command, "--allow-partial"], capture_output=True, text=True, check=True).stdout
    assert "kohya" in shown
    assert STRAY in shown
    report = client.adapters.get("partial").current.report
    assert report is not None
    assert (report.num_unmatched_keys, report.unmatched_keys) == (1, (STRAY,))
    assert client.generate("a ring", adapters=["partial"], options=QUICK).images
    with pytest.raises(AdapterIncompatibleError):
        client.adapters.load(str(path), name="partial")
    assert client.generate("a ring", adapters=["partial"], options=QUICK).images


def test_dora_runs_merged_and_says_so(client: LoraClient, demo_adapters: Path) -> None:
    """What has no low-rank form is drawn with merged, and the report and the request's stats tell."""
    path = demo_adapters / "dora.safetensors"
    written = write_lora(MODULES, kohya("lora_unet"))
    for module, (rows, _) in MODULES.items():
        written.tensors[f"lora_unet_{module.replace('.', '_')}.dora_scale"] = torch.rand(rows, 1) + 0.5
    written.save(path)
    report = client.adapters.load(str(path), name="dora").current.report
    assert report is not None
    assert (report.kinds, report.merged_only) == (("dora",), True)
    options = GenerationOptions(num_inference_steps=3, num_images=2)
    assert set(client.generate("a ring", adapters=["dora"], options=options).stats.steps_by_way) == {"merged"}

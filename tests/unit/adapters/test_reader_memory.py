"""What reading a large adapter takes at its peak: the file, the converted tensors and 16 MiB, whatever its kind."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.source import AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.models.weights import LinearShape
from safetensors.torch import save_file
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
    weights_for = torch.bfloat16, torch.device("cpu")
    model = "tiny", "tiny", "transformer"
    loader = AdapterLoader(AdapterRoots([tmp_path]), {"transformer": shapes}, model, weights_for, LimitsConfig())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = status_bytes("VmRSS")
    weights = loader.load(file).weights
    grown, allowed = status_bytes("VmHWM") - before, file.stat().st_size + weights.size_bytes + SLACK_BYTES
    assert weights.size_bytes > 30e6, "large enough to be told from the slack"
    assert grown <= allowed, f"took {grown / 1e6:.0f} MB, {allowed / 1e6:.0f} are allowed"

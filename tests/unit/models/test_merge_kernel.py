"""The kernel that writes merged weights, against float64. On a GPU, or, where Triton is, in its interpreter.

On a GPU machine without this project's tools: python -m pytest --noconftest -c /dev/null FILE
On the CPU: TRITON_INTERPRET=1, with Triton installed.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or Triton's interpreter", allow_module_level=True)

from lora_server.models import merge
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.models.merge_kernel import write_merged
from lora_server.models.weights import LowRankDelta, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]  # all the interpreter multiplies
SHAPES = [
    # modules, out, in, columns of pages, rank, changed modules
    (3, 40, 72, 64, 8, [0, 2]),
    (4, 64, 128, 16, 16, [1, 2, 3]),
    (2, 130, 300, 8, 33, [1]),
    (5, 7, 9, 0, 1, [0, 1, 4]),
]


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("modules", "out", "in_", "columns", "rank", "changed"), SHAPES)
def test_the_kernel_equals_float64(
    modules: int, out: int, in_: int, columns: int, rank: int, changed: list[int], dtype: torch.dtype
) -> None:
    """Each weight is the exact sum rounded once (within the accumulator's own error); all else stays bit for bit."""
    torch.manual_seed(0)
    stack, pristine = random(modules, out, in_ + columns, dtype=dtype), random(modules, out, in_, dtype=dtype)
    b, a = random(len(changed), out, rank, dtype=dtype), random(len(changed), rank, in_, dtype=dtype)
    before, base = stack.clone(), stack[:, :, :in_]
    write_merged(base, pristine, torch.tensor(changed, device=DEVICE), b, a, -0.37)
    exact = pristine[changed].double() - 0.37 * (b.double() @ a.double())
    tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert bool(((base[changed].double() - exact).abs() <= tolerance).all())
    others = [k for k in range(modules) if k not in changed]
    assert torch.equal(stack[others], before[others])
    assert torch.equal(stack[:, :, in_:], before[:, :, in_:])


def test_factors_at_odd_addresses() -> None:
    """An adapter of an odd shape puts those behind it at odd places of its buffer."""
    torch.manual_seed(0)
    flat, pristine = random(2 * 8 * 32 + 1), random(1, 32, 32)
    a, b = flat[1 : 1 + 8 * 32].view(1, 8, 32), flat[1 + 8 * 32 :].view(1, 32, 8)
    base = torch.zeros_like(pristine)
    write_merged(base, pristine, torch.tensor([0], device=DEVICE), b, a, 1.0)
    torch.testing.assert_close(base.double(), pristine.double() + b.double() @ a.double(), rtol=1e-3, atol=1e-3)


def test_the_base_comes_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the merger, after 100 changes."""
    monkeypatch.setattr(merge, "_has_kernel", lambda base: True)
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(24, 24) for _ in range(4)]).half().to(DEVICE)
    before = [linear.weight.detach().clone() for linear in net]
    merger, targets = WeightMerger("net", LinearStore(net, 16)), {"net": linear_shapes(net)}
    made = [
        pack({"net": {path: LowRankDelta(random(r, 24).cpu(), random(24, r).cpu(), 1.0) for path in paths}}, targets)
        for r, paths in ((4, ("0", "2")), (8, ("1", "2", "3")))
    ]
    on_device = [weights.to(DEVICE) for weights in made]
    for k in range(100):
        merger.apply([ScaledAdapter(f"sha256:{k % 2}", 0.5, on_device[k % 2])])
        assert not torch.equal(net[2].weight, before[2])
    merger.apply(())
    assert all(torch.equal(linear.weight, kept) for linear, kept in zip(net, before, strict=True))

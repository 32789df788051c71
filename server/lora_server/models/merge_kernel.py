"""The merged weights of a group in one pass over memory: W[m] = W_base[m] + alpha * B[k] A[k], m the k-th member.

What a batched product, a gather and a scatter do in three, where an adapter leaves modules of a group out; the traffic
is what a change of merged weights costs (docs/performance.md). CUDA only; needs Triton, which comes with torch there.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _WIDTH, _RANK = 64, 128, 16
_ALIGNMENT_BYTES = 16


# Whatever differs between adapters is not specialized on: they never make the compiler run.
@triton.jit(do_not_specialize=["alpha", "rank"])  # type: ignore[untyped-decorator, unused-ignore]
def _write(  # type: ignore[no-untyped-def]
    base, pristine, members, b, a, alpha, out_features, in_features, rank, base_stride, base_row, pristine_stride,
    rows_at_once: tl.constexpr, width_at_once: tl.constexpr, rank_at_once: tl.constexpr,
):  # fmt: skip
    """One tile of one member; accumulates in float32 and rounds once."""
    k = tl.program_id(2).to(tl.int64)
    member = tl.load(members + k)
    rows = tl.program_id(1) * rows_at_once + tl.arange(0, rows_at_once)[:, None]
    columns = tl.program_id(0) * width_at_once + tl.arange(0, width_at_once)[None, :]
    total = tl.zeros((rows_at_once, width_at_once), tl.float32)
    for first in range(0, rank, rank_at_once):
        across, down = first + tl.arange(0, rank_at_once)[None, :], first + tl.arange(0, rank_at_once)[:, None]
        b_part = b + k * out_features * rank + rows * rank + across
        a_part = a + k * rank * in_features + down * in_features + columns
        left = tl.load(b_part, mask=(rows < out_features) & (across < rank), other=0.0)
        right = tl.load(a_part, mask=(down < rank) & (columns < in_features), other=0.0)
        total = tl.dot(left, right, total)
    inside = (rows < out_features) & (columns < in_features)
    before = tl.load(pristine + member * pristine_stride + rows * in_features + columns, mask=inside, other=0.0)
    after = (before.to(tl.float32) + alpha * total).to(base.dtype.element_ty)
    tl.store(base + member * base_stride + rows * base_row + columns, after, mask=inside)


def write_merged(base: Tensor, pristine: Tensor, members: Tensor, b: Tensor, a: Tensor, alpha: float) -> None:
    """Writes base[m] = pristine[m] + alpha * b[k] @ a[k] for the k-th of *members*; others stay as they are.

    Args:
        base: (L, out, in), its last dimension contiguous; bfloat16 or float16, as all others.
        pristine: (L, out, in), contiguous.
        members: (n,) int64, different from each other.
        b: (n, out, R), contiguous.
        a: (n, R, in), contiguous.
        alpha: What the products are multiplied with, before they are rounded.
    """
    _, out_features, in_features = base.shape
    a, b = _aligned(a), _aligned(b)
    grid = (triton.cdiv(in_features, _WIDTH), triton.cdiv(out_features, _ROWS), len(members))
    with torch.cuda.device(base.device) if base.is_cuda else nullcontext():  # the interpreter is on the CPU
        _write[grid](
            base, pristine, members, b, a, float(alpha), out_features, in_features, a.shape[1],
            base.stride(0), base.stride(1), pristine.stride(0),
            rows_at_once=_ROWS, width_at_once=_WIDTH, rank_at_once=_RANK,
        )  # fmt: skip


def _aligned(factor: Tensor) -> Tensor:
    """The compiler specializes on the alignment of pointers, too: factors at odd addresses are copied to even ones."""
    factor = factor.contiguous()
    return factor if factor.data_ptr() % _ALIGNMENT_BYTES == 0 else factor.clone()

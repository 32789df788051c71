"""The leads behind the slots way and the compiled blocks, each as kernels of the true shapes: what fusing would save.

python -m benchmarks.kernels [--device cuda] [--width 1536] [--out FILE]

One row a variant: seconds of the median run, and the rate of its useful arithmetic. Shapes are those of Stable
Diffusion 3.5 medium: images of 512 and 1024 px, two rows an image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import graphed, median_s

_HEADS, _TEXT_TOKENS = 24, 333

_TUNINGS: dict[str, dict[str, object] | None] = {
    "default": None,
    "coordinate descent": {"coordinate_descent_tuning": True},
    "multi-kernel": {"triton.multi_kernel": 1},
    "persistent": {"triton.multi_kernel": 2},
}
"""Options of the compiler for kernels of norms and elementwise arithmetic."""

Variant = tuple[str, Callable[[], object], float]
"""Name, what to run, and its floating-point operations."""


class Shapes:
    """Tensors of one number of token rows."""

    def __init__(self, width: int, rows: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.width, self.rows, self.tokens = width, rows, tokens
        self._place = {"device": device, "dtype": dtype}

    def random(self, *shape: int) -> Tensor:
        """Normal values of a natural size."""
        return torch.randn(shape, **self._place) * 0.02  # type: ignore[call-overload,no-any-return]

    def projections(self, columns: int) -> Iterator[Variant]:
        """q, k and v of one input: apart, in one product, with columns, with columns in one block-diagonal product."""
        c, x = self.width, self.random(self.rows, self.tokens, self.width)
        weight, bias = self.random(3 * c, c + 3 * columns), self.random(3 * c)
        a, gate = self.random(3 * columns, c), self.random(self.rows, 1, 3 * columns)
        flop = 2.0 * self.rows * self.tokens * c * 3 * c
        parts = [(weight[k * c : (k + 1) * c], bias[k * c : (k + 1) * c]) for k in range(3)]

        def apart() -> list[Tensor]:
            return [functional.linear(x, w[:, :c], b) for w, b in parts]

        def extended(h: Tensor) -> list[Tensor]:
            split = h.split(columns, dim=-1)
            return [
                functional.linear(torch.cat([x, part], dim=-1), w[:, : c + columns], b)
                for (w, b), part in zip(parts, split, strict=True)
            ]

        yield "q, k, v apart", apart, flop
        yield "q, k, v in one product", lambda: functional.linear(x, weight[:, :c], bias), flop
        yield f"{columns} columns: x A^T alone", lambda: functional.linear(x, a), 0.0
        yield f"{columns} columns, apart", _compiled(lambda: extended(functional.linear(x, a) * gate)), flop
        yield (
            f"{columns} columns, one block-diagonal product",
            _compiled(lambda: functional.linear(torch.cat([x, functional.linear(x, a) * gate], dim=-1), weight, bias)),
            flop,
        )

    def after_norm(self, columns: int) -> Iterator[Variant]:
        """The same behind the modulated norm that makes x, as in a block: what the copies of x cost there."""
        c, x = self.width, self.random(self.rows, self.tokens, self.width)
        shift, scale = self.random(self.rows, 1, c), self.random(self.rows, 1, c)
        weights = [self.random(c, c + columns) for _ in range(3)]
        a, gate = self.random(3 * columns, c), self.random(self.rows, 1, 3 * columns)
        flop = 2.0 * self.rows * self.tokens * c * 3 * c

        def normed() -> Tensor:
            return functional.layer_norm(x, (c,)) * (1 + scale) + shift

        def plain() -> list[Tensor]:
            y = normed()
            return [functional.linear(y, w[:, :c]) for w in weights]

        def open_columns() -> list[Tensor]:
            y = normed()
            split = (functional.linear(y, a) * gate).split(columns, dim=-1)
            return [functional.linear(torch.cat([y, h], -1), w) for w, h in zip(weights, split, strict=True)]

        for name, options in _TUNINGS.items():
            yield f"norm alone, {name}", _compiled(normed, options), 0.0
        yield "norm, q, k, v", _compiled(plain), flop
        yield f"norm, q, k, v with {columns} columns", _compiled(open_columns), flop

    def feed_forward(self) -> Iterator[Variant]:
        """The first linear of the feed-forward and its GELU: apart, and as the epilogue of the product."""
        c = self.width
        x, bias = self.random(self.rows * self.tokens, c), self.random(4 * c)
        weight = self.random(4 * c, c + 64)[:, :c]  # strided, as it lies beside the columns
        flop = 2.0 * self.rows * self.tokens * c * 4 * c
        yield (
            "feed-forward and GELU apart",
            _compiled(lambda: functional.gelu(functional.linear(x, weight, bias), approximate="tanh")),
            flop,
        )
        yield (
            "feed-forward and GELU in one",
            lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
            flop,
        )

    def attention(self) -> Iterator[Variant]:
        """Joint attention by kernel."""
        tokens = self.tokens + _TEXT_TOKENS
        q, k, v = (self.random(self.rows, _HEADS, tokens, self.width // _HEADS) for _ in range(3))
        flop = 4.0 * self.rows * tokens * tokens * self.width
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def attend(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
                    return functional.scaled_dot_product_attention(q, k, v)

            yield f"attention, {backend.name.lower()}", attend, flop


def main() -> None:
    """Prints a table; writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--only", default="", help="only variants whose name has this")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, rows, tokens in _sizes(device):
            torch.compiler.reset()
            shapes = Shapes(arguments.width, rows, tokens, device, dtype)
            variants = [*shapes.projections(64), *shapes.after_norm(64), *shapes.feed_forward(), *shapes.attention()]
            for what, action, flop in variants:
                if arguments.only not in what:
                    continue
                seconds = median_s(graphed(action) if device.type == "cuda" else action, device)
                found.setdefault(name, {})[what] = seconds
                print(f"{name:24} {what:48} {seconds * 1e6:9.1f} us {flop / seconds / 1e12:7.1f} TFLOP/s", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def _sizes(device: torch.device) -> list[tuple[str, int, int]]:
    if device.type == "cpu":
        return [("tiny", 2, 64)]
    sizes = [(f"{images} of {side} px", 2 * images, (side // 16) ** 2) for side in (512, 1024) for images in (1, 4)]
    return [*sizes, ("text of 4", 8, _TEXT_TOKENS)]


def _compiled(action: Callable[[], object], options: dict[str, object] | None = None) -> Callable[[], object]:
    return torch.compile(action, dynamic=False, options=options) if torch.cuda.is_available() else action


if __name__ == "__main__":
    main()

"""Linears and convolutions whose rows may each have adapters of their own: the slots way of applying adapters.

    y[i] = W x[i] + sum over the columns c of gate[i, c] * B[:, c] (A[c] . x[i])

A and B of resident adapters lie in the pages of a `LinearStore`; a row opens the columns of its adapters with its scale
and leaves the others shut. Changing adapters or rows changes the contents of tensors only, never a shape or an address,
so compiled code and CUDA graphs stay valid. Two forms of the same sum:

- columns: all rows meet all open columns, and B rides in the GEMM: [x | gate * (x A^T)] @ [W | B]^T. On CUDA, where it
  costs one small product and K more columns in a large one (measured in docs/performance.md);
- gathered: every row gathers the columns that it opens, for a batched product of its own. On the CPU, which is bound by
  arithmetic and not by launches.

A convolution is a linear over patches: A is a convolution with its kernel, stride and padding, B one with a 1x1 kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_server.models.linear_store import LinearStore


@dataclass(frozen=True, slots=True)
class RowGate:
    """What one row opens: scale by column."""

    scales: Mapping[int, float]


class Gates:
    """The gates of the rows of one forward pass, shared by all linears of a component.

    Attributes:
        dense: (max_rows, K), the gate of every row and column; a fixed address.
        index, compact: (rows, P) each, in the gathered form: the columns that a row opens, and their gates.
    """

    def __init__(self, max_rows: int, columns: int, like: Tensor, *, gathered: bool) -> None:
        self.gathered = gathered
        self._rows: list[RowGate] = []
        self.dense = torch.zeros((max_rows, columns), dtype=like.dtype, device=like.device)
        self.index = torch.zeros((0, 0), dtype=torch.long, device=like.device)
        self.compact = torch.zeros((0, 0), dtype=like.dtype, device=like.device)

    def set(self, rows: Sequence[RowGate]) -> None:
        """Sets the gates of the next forward passes, row by row; rows beyond these are shut."""
        if rows == self._rows:
            return
        self._rows = list(rows)
        if self.gathered:
            self._set_gathered(rows)
            return
        columns = range(self.dense.shape[1])
        values = [[row.scales.get(column, 0.0) for column in columns] for row in rows]
        self.dense[: len(rows)] = torch.tensor(values).to(self.dense, non_blocking=True)
        self.dense[len(rows) :] = 0

    def _set_gathered(self, rows: Sequence[RowGate]) -> None:
        width = max((len(row.scales) for row in rows), default=0)
        index, compact = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width))
        for i, row in enumerate(rows):
            for place, (column, scale) in enumerate(sorted(row.scales.items())):
                index[i, place], compact[i, place] = column, scale
        self.index = index.to(self.dense.device)
        self.compact = compact.to(self.dense)


class LoraLinear(nn.Linear):
    """A linear with pages of adapters beside its weight.

    Attributes:
        columns: How many columns take part in the forward pass; 0 is the plain linear on `weight`.
    """

    columns: int
    gates: Gates

    def __init__(self, linear: nn.Linear, extended: Tensor, page_a: Tensor, gates: Gates) -> None:
        """Takes over *linear*, whose weight lies in *extended*, (out, in + K); *page_a* is (K, in)."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("extended", extended, persistent=False)
        self.register_buffer("page_a", page_a, persistent=False)
        self.columns = 0
        self.gates = gates

    extended: Tensor
    page_a: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Returns (B, ..., out) for (B, ..., in); row i is gated by row i of `gates`."""
        if not self.columns:
            return functional.linear(input, self.weight, self.bias)
        return self._gathered(input) if self.gates.gathered else self._by_columns(input)

    def _by_columns(self, x: Tensor) -> Tensor:
        return functional.linear(*self.operands(x), self.bias)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the input and the weight whose product is W x, with open columns W x + B h."""
        k = self.columns
        if not k:
            return x, self.weight
        h = functional.linear(x, self.page_a[:k])
        return self._extended(x, gated(h, _for_rows(self.gates.dense[: x.shape[0], :k], x)))

    def expand(self, x: Tensor, h: Tensor) -> Tensor:
        """Returns W x + B h + bias in one product, for gated *h*, (B, ..., columns)."""
        return functional.linear(*self._extended(x, h), self.bias)

    def _extended(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, h], dim=-1), self.extended[:, : self.in_features + h.shape[-1]]

    def _gathered(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        index = self.gates.index
        if not index.shape[1]:
            return y
        a = self.page_a[index]  # (B, P, in)
        b = self.extended[:, self.in_features :].t()[index]  # (B, P, out)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        h = gated(torch.bmm(rows, a.transpose(1, 2)), self.gates.compact[:, None, :])
        return torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), h, b).view(y.shape)


class LoraConv(nn.Conv2d):
    """A convolution with pages of adapters beside its weight.

    Attributes:
        columns: How many columns take part in the forward pass; 0 is the plain convolution.
        is_plain: Without columns it computes what a Conv2d does (`linear_store` asks).
    """

    is_plain = True
    columns: int
    gates: Gates
    page_a: Tensor
    page_b: Tensor

    def __init__(self, conv: nn.Conv2d, page_a: Tensor, page_b: Tensor, gates: Gates) -> None:
        """Takes over *conv*; *page_a* is (K, in_channels * kh * kw), *page_b* (out_channels, K)."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        kernel = conv.weight.shape[1:]
        self.register_buffer("page_a", page_a.view(len(page_a), *kernel), persistent=False)
        self.register_buffer("page_b", page_b, persistent=False)
        self.columns = 0
        self.gates = gates

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        """Returns (B, out, H', W') for (B, in, H, W); row i is gated by row i of `gates`."""
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        if not self.columns:
            return y
        return self._gathered(input, y) if self.gates.gathered else self._by_columns(input, y)

    def _by_columns(self, x: Tensor, y: Tensor) -> Tensor:
        k = self.columns
        h = gated(self._conv_forward(x, self.page_a[:k], None), self.gates.dense[: x.shape[0], :k, None, None])
        return y + functional.conv2d(h, self.page_b[:, :k, None, None])

    def _gathered(self, x: Tensor, y: Tensor) -> Tensor:
        index = self.gates.index
        if not index.shape[1]:
            return y
        a = self.page_a[index]  # (B, P, in, kh, kw)
        b = self.page_b.t()[index].transpose(1, 2)  # (B, out, P)
        # One convolution with a group for each row.
        h = functional.conv2d(
            x.reshape(1, -1, *x.shape[2:]), a.flatten(0, 1), None, self.stride, self.padding, self.dilation, len(x)
        )
        h = gated(h.view(*index.shape, -1), self.gates.compact[:, :, None])
        return torch.baddbmm(y.flatten(2), b, h).view(y.shape)


def gated(h: Tensor, gate: Tensor) -> Tensor:
    """Returns gate * h, and 0 where the gate is shut.

    There h is of another row's adapter, and what overflows in it must not reach this row: 0 * inf is NaN.
    """
    return (h * gate).masked_fill_(
        gate == 0, 0.0
    )  # not `where`, whose number would be copied while a graph is captured


def _for_rows(gate: Tensor, x: Tensor) -> Tensor:
    """Gives *gate*, (B, K), the dimensions of *x*, (B, ..., in), to be broadcast over."""
    return gate.view(gate.shape[0], *[1] * (x.dim() - 2), gate.shape[1])


def project_together(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Returns what each of the linears makes of *x*, as if called one by one.

    If their columns are open, one product with all their A serves them all: x is read once and not three times.
    """
    first = linears[0]
    shared = isinstance(first, LoraLinear) and first.columns and not first.gates.gathered
    if not shared or len({getattr(linear, "columns", 0) for linear in linears}) > 1:
        return tuple(linear(x) for linear in linears)
    paged = [linear for linear in linears if isinstance(linear, LoraLinear)]
    k = paged[0].columns
    gate = _for_rows(paged[0].gates.dense[: x.shape[0], :k], x)
    h = functional.linear(x, torch.cat([linear.page_a[:k] for linear in paged]))
    parts = h.split(k, dim=-1)
    return tuple(linear.expand(x, gated(part, gate)) for linear, part in zip(paged, parts, strict=True))


class PagedLinears:
    """All linears and convolutions of the denoiser, made ready for pages. Engine thread only.

    Attributes:
        gates: The gates of the rows.
        columns, target_class: What is open.
    """

    def __init__(self, root: nn.Module, store: LinearStore, max_rows: int, classes: Sequence[frozenset[str]]) -> None:
        """Replaces the linears and convolutions of *root*.

        *classes* are sets of paths, each in the next; a batch whose adapters change linears of a small class only
        leaves the other linears alone. The last one has to hold all paths.
        """
        like = store.base(0)
        self.gates = Gates(max_rows, store.columns, like, gathered=like.device.type == "cpu")
        self._classes = classes
        self.columns = 0
        self.target_class = 0
        self._linears: dict[str, LoraLinear | LoraConv] = {}
        for g, group in enumerate(store.groups):
            for k, path in enumerate(group.paths):
                paged = self._paged(root.get_submodule(path), store, g, k)
                root.set_submodule(path, paged)
                self._linears[path] = paged

    def _paged(self, module: nn.Module, store: LinearStore, group: int, member: int) -> LoraLinear | LoraConv:
        if isinstance(module, nn.Conv2d):
            return LoraConv(module, store.all_page_a(group)[member], store.all_page_b(group)[member], self.gates)
        assert isinstance(module, nn.Linear)
        return LoraLinear(module, store.extended(group)[member], store.all_page_a(group)[member], self.gates)

    def class_of(self, paths: Iterable[str]) -> int:
        """The smallest class that holds all *paths*."""
        wanted = frozenset(paths)
        return next(k for k, members in enumerate(self._classes) if wanted <= members)

    def open(self, columns: int, target_class: int) -> None:
        """Lets the first *columns* columns take part in the linears of a class; 0 columns shut the pages."""
        target_class = target_class if columns else 0
        if (columns, target_class) == (self.columns, self.target_class):
            return
        self.columns, self.target_class = columns, target_class
        members = self._classes[target_class] if columns else frozenset()
        for path, linear in self._linears.items():
            linear.columns = columns if path in members else 0

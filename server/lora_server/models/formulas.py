"""Deltas that are no low-rank product, or of too high a rank: kept as their formula and worked out when merged.

    W' - W at scale 1, where  D = scaling * (F1  |  F1 * F2 elementwise (LoHa)  |  F1 kron F2 (LoKr)),
    W' = W + D,  or with magnitudes m (DoRA)  W' = m * (W + D) / ||W + D||

Each F is a matrix or a product of two. DoRA's delta depends on the base weights, so it cannot be worked out earlier;
the others could, but would take as much memory as the layers that they change. Knows nothing of files or caches.
Sources: Hyeon-Woo 2021 (LoHa), Edalati 2022 (LoKr), Liu 2024 (DoRA, eq. 5).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_server.models.host_memory import Allocate, ordinary_memory

Factors = tuple[Tensor, ...]
"""One matrix, or two to be multiplied."""


class Combination(enum.Enum):
    """How a delta is made of its factors."""

    PRODUCT = "product"
    HADAMARD = "hadamard"
    KRONECKER = "kronecker"


@dataclass(frozen=True, slots=True, eq=False)
class FormulaDelta:
    """The change of one weight at scale 1, as a formula.

    Attributes:
        combination: What is made of *first* and *second*.
        first, second: Factors, all two-dimensional; *second* is empty for PRODUCT.
        scaling: Of the delta before magnitudes.
        magnitude: None, or DoRA's: (out, 1) for one an output, (1, C) for one an input channel.
        rows: Ranges of the combination's rows that are this weight's, in order; None for all.
        rank: As the file has it, for reports.
    """

    combination: Combination
    first: Factors
    second: Factors
    scaling: float
    magnitude: Tensor | None
    rows: tuple[tuple[int, int], ...] | None
    rank: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in an order that `with_tensors` takes."""
        return (*self.first, *self.second, *(() if self.magnitude is None else (self.magnitude,)))

    def map(self, change: Callable[[Tensor], Tensor]) -> FormulaDelta:
        """Returns the same formula with *change* done to every tensor."""
        magnitude = None if self.magnitude is None else change(self.magnitude)
        first, second = tuple(map(change, self.first)), tuple(map(change, self.second))
        return FormulaDelta(self.combination, first, second, self.scaling, magnitude, self.rows, self.rank)

    def delta(self, base: Tensor) -> Tensor:
        """Returns W' - W for the pristine W, (out, in), in W's type; nothing is kept."""
        plain = self.combined().to(base.dtype)
        if self.magnitude is None:
            return plain
        changed = base + plain
        return changed * self._factor(changed, self.magnitude.to(base.dtype)) - base

    def combined(self) -> Tensor:
        """Returns D, (out, in)."""
        first = _product(self.first)
        if self.combination is Combination.HADAMARD:
            first = first * _product(self.second)
        elif self.combination is Combination.KRONECKER:
            first = torch.kron(first, _product(self.second))
        if self.rows is not None:
            first = torch.cat([first[start:stop] for start, stop in self.rows])
        return first * self.scaling

    @staticmethod
    def _factor(changed: Tensor, magnitude: Tensor) -> Tensor:
        """m / ||W + D||, of a shape that multiplies (out, in)."""
        if magnitude.shape[1] == 1:
            return magnitude / _positive(changed.norm(dim=1, keepdim=True))
        channels = magnitude.shape[1]
        by_channel = changed.view(changed.shape[0], channels, -1)
        factor = magnitude.view(channels, 1) / _positive(by_channel.norm(dim=(0, 2))).view(channels, 1)
        return factor.expand(channels, by_channel.shape[2]).reshape(1, -1)


@dataclass(frozen=True, slots=True, eq=False)
class GroupFormula:
    """The formula of one member of a group of equally shaped weights."""

    group: int
    member: int
    formula: FormulaDelta


def _positive(norm: Tensor) -> Tensor:
    """Keeps a weight of zeros from becoming NaN."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _product(factors: Factors) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


class FormulaPacking:
    """One buffer for the tensors of formulas, filled as they are converted, so that no two copies are kept.

    What several formulas share is there once. Not thread-safe.
    """

    def __init__(
        self, sketches: Sequence[GroupFormula], dtype: torch.dtype, allocate: Allocate = ordinary_memory
    ) -> None:
        """Lays out *sketches*, formulas of whose tensors only the shapes count, in a buffer that *allocate* makes."""
        distinct = {id(tensor): tensor for each in sketches for tensor in each.formula.tensors}
        self.flat = allocate(sum(map(Tensor.numel, distinct.values())), dtype)
        self._views: dict[int, Tensor] = {}
        offset = 0
        for key, tensor in distinct.items():
            self._views[key] = self.flat[offset : offset + tensor.numel()].view(tensor.shape)
            offset += tensor.numel()
        self._sketches = sketches  # keeps the ids theirs

    def fill(self, sketch: FormulaDelta, formula: FormulaDelta) -> None:
        """Copies the tensors of *formula*, of any floating-point type, to the places of *sketch*'s."""
        for place, tensor in zip(sketch.tensors, formula.tensors, strict=True):
            self._views[id(place)].copy_(tensor)

    def formulas(self) -> list[GroupFormula]:
        """The formulas over views of the buffer, in the order of the sketches."""
        return [
            GroupFormula(each.group, each.member, each.formula.map(lambda tensor: self._views[id(tensor)]))
            for each in self._sketches
        ]

"""From the tensors of one module to its delta: a low-rank product where there is an exact one, else a formula.

All in two dimensions: a convolution's kernel counts as input, in the order of its weight. Sources: LyCORIS
(`lycoris/functional`), peft (`tuners/loha`, `tuners/lokr`); tests hold every kind against peft or LyCORIS' own formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_server.adapters.formats.keys import Role
from lora_server.adapters.formats.layouts.part import Rows
from lora_server.models.formulas import Combination, Factors, FormulaDelta
from lora_server.models.weights import LowRankDelta

Tensors = Mapping[Role, Tensor]
"""The tensors of one module, as they lie in the file; only their shapes count if they are on the device `meta`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A module's delta before its parts are taken: `first`, or a combination of both, times *scaling*.

    Attributes:
        magnitude: None, or DoRA's, (out, 1) or (1, C).
        rank: As the file has it.
        exact: The type in which products of tensors are worked out.
    """

    combination: Combination
    first: Factors
    second: Factors
    scaling: float
    magnitude: Tensor | None
    rank: int
    exact: torch.dtype

    def part(self, rows: Rows | None, slot_rank: int) -> LowRankDelta | FormulaDelta:
        """Returns the delta of some of the rows: low-rank if that is exact with at most *slot_rank*, else a formula."""
        low_rank = None if self.magnitude is not None else self._low_rank(slot_rank)
        if low_rank is not None:
            b, a = low_rank
            return LowRankDelta(a, _take(b, rows), self.scaling)
        magnitude = self.magnitude
        if magnitude is not None and magnitude.shape[1] == 1:
            magnitude = _take(magnitude, rows)
        if self.combination is Combination.KRONECKER:
            return FormulaDelta(self.combination, self.first, self.second, self.scaling, magnitude, rows, self.rank)
        first, second = _take_first(self.first, rows), _take_first(self.second, rows)
        return FormulaDelta(self.combination, first, second, self.scaling, magnitude, None, self.rank)

    def _low_rank(self, most: int) -> tuple[Tensor, Tensor] | None:
        """(B, A) with at most *most* columns, exactly; None if there is none."""
        if self.combination is Combination.PRODUCT:
            b, a = self.first
            return b, a  # the file's own rank, which has a limit of its own
        if self.combination is Combination.HADAMARD:
            (b1, a1), (b2, a2) = self._exact(self.first), self._exact(self.second)
            if b1.shape[1] * b2.shape[1] > most:
                return None
            # (B1 A1) * (B2 A2) = sum over i, j of (b1_i * b2_j) (a1_i * a2_j)^T
            b = torch.einsum("oi,oj->oij", b1, b2).flatten(1)
            return b, torch.einsum("ix,jx->ijx", a1, a2).flatten(0, 1)
        (u1, v1), (u2, v2) = _two(self._exact(self.first)), _two(self._exact(self.second))
        if u1.shape[1] * u2.shape[1] > most:
            return None
        return torch.kron(u1, u2), torch.kron(v1, v2)  # (U1 V1) kron (U2 V2) = (U1 kron U2) (V1 kron V2)

    def _exact(self, factors: Factors) -> Factors:
        return tuple(factor.to(self.exact).contiguous() for factor in factors)  # kron wants it


def delta_of(
    kind: str, tensors: Tensors, scaling: float, rank: int, *, exact: torch.dtype, magnitude_by_output: bool
) -> Delta:
    """Combines the tensors of one module. What needs no arithmetic stays a view of them, of the file's type.

    *magnitude_by_output* says that the magnitudes are one an output whatever their shape, as peft's are; else the
    shape says what they are, as in LyCORIS and Kohya.
    """
    magnitude = tensors.get(Role.MAGNITUDE)
    if magnitude is not None:
        magnitude = _magnitude(magnitude, by_output=magnitude_by_output)
    if kind == "lora":
        first = _lora(tensors[Role.UP], tensors[Role.DOWN], tensors.get(Role.MID), exact)
        return Delta(Combination.PRODUCT, first, (), scaling, magnitude, rank, exact)
    if kind == "loha":
        first = _factored(tensors[Role.HADA_W1_A], tensors[Role.HADA_W1_B], tensors.get(Role.HADA_T1), exact)
        second = _factored(tensors[Role.HADA_W2_A], tensors[Role.HADA_W2_B], tensors.get(Role.HADA_T2), exact)
        return Delta(Combination.HADAMARD, first, second, scaling, magnitude, rank, exact)
    first = (
        (tensors[Role.LOKR_W1],)
        if Role.LOKR_W1 in tensors
        else _factored(tensors[Role.LOKR_W1_A], tensors[Role.LOKR_W1_B], None, exact)
    )
    second = (
        (tensors[Role.LOKR_W2].flatten(1),)
        if Role.LOKR_W2 in tensors
        else _factored(tensors[Role.LOKR_W2_A], tensors[Role.LOKR_W2_B], tensors.get(Role.LOKR_T2), exact)
    )
    return Delta(Combination.KRONECKER, first, second, scaling, magnitude, rank, exact)


def _lora(up: Tensor, down: Tensor, mid: Tensor | None, exact: torch.dtype) -> Factors:
    if mid is None:
        return up.flatten(1), down.flatten(1)
    # LoCon's Tucker form: up (out, R), mid (R, R, kh, kw), down (R, in); up and mid are kept apart only by rank.
    core = torch.einsum("ijkl,jx->ixkl", mid.to(exact), down.flatten(1).to(exact))
    return up.flatten(1), core.flatten(1)


def _factored(a: Tensor, b: Tensor, core: Tensor | None, exact: torch.dtype) -> Factors:
    """a (out, R) and b (R, in), or LyCORIS' Tucker form with a core (R, R, kh, kw), a (R, out) and b (R, in)."""
    if core is None:
        return a, b.flatten(1)
    return a.t(), torch.einsum("ijkl,jx->ixkl", core.to(exact), b.to(exact)).flatten(1)


def _magnitude(magnitude: Tensor, *, by_output: bool) -> Tensor:
    if by_output or magnitude.ndim == 1 or magnitude.shape[1:].numel() == 1:
        return magnitude.reshape(-1, 1)
    return magnitude.reshape(1, -1)


def _two(factors: Factors) -> tuple[Tensor, Tensor]:
    """A matrix as a product of the least inner size, itself and an identity."""
    if len(factors) == 2:
        return factors
    (matrix,) = factors
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype, device=matrix.device), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)


def _take(matrix: Tensor, rows: Rows | None) -> Tensor:
    if rows is None:
        return matrix
    taken = [matrix[start:stop] for start, stop in rows]
    return taken[0] if len(taken) == 1 else torch.cat(taken)


def _take_first(factors: Factors, rows: Rows | None) -> Factors:
    return (_take(factors[0], rows), *factors[1:]) if factors else ()

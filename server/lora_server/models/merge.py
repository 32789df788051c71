"""Merged application: a composition is written into the weights, in place, from pristine copies.

    W = W_base + sum over adapters of scale * scaling * (B @ A)

Owns the pristine copies and knows what is written now. Never subtracts: subtracting drifts by rounding, copying back
gives the base bit for bit after any number of switches. Knows nothing of requests or caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_server.models.weights import AdapterWeights, LowRankDelta
from lora_server.types import Digest


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """One member of a composition: a version's weights, on the model's device, and the scale to apply them at."""

    digest: Digest
    scale: float
    weights: AdapterWeights


class WeightMerger:
    """Writes compositions into the linear weights of one component. Not thread-safe: the engine thread's own.

    | invariant | |
    |---|---|
    | a module not in `_pristine` | holds its base weight |
    | `_active` is a key | every module holds exactly base + that composition |
    | `_active` is None | a write was interrupted; the next `apply` rewrites every touched module |
    """

    def __init__(self, component: str, root: torch.nn.Module) -> None:
        self._component = component
        self._linears = {path: module for path, module in root.named_modules() if isinstance(module, torch.nn.Linear)}
        self._pristine: dict[str, torch.Tensor] = {}
        self._active: tuple[tuple[Digest, float], ...] | None = ()
        self._modified: set[str] = set()

    def apply(self, composition: Sequence[ScaledAdapter]) -> bool:
        """Makes the component hold base + *composition*; an empty one is the base, bit for bit.

        A composition is a set: its order does not matter, and members at scale 0 or without deltas for this
        component add nothing. Returns whether anything was written (False: it was active already). If it raises
        (out of memory), the weights are undefined until the next call, which repairs them.
        """
        members = sorted(
            (member for member in composition if member.scale and self._component in member.weights.deltas),
            key=lambda member: member.digest,
        )
        key = tuple((member.digest, member.scale) for member in members)
        if key == self._active:
            return False
        deltas = _deltas_by_module(self._component, members)
        self._active = None
        for path in self._modified - deltas.keys():
            self._linears[path].weight.data.copy_(self._pristine[path])
        self._modified &= deltas.keys()
        for path, terms in deltas.items():
            self._write(path, terms)
        self._active = key
        return True

    def _write(self, path: str, terms: Iterable[tuple[float, LowRankDelta]]) -> None:
        weight = self._linears[path].weight.data
        pristine = self._pristine.get(path)
        if pristine is None:
            pristine = self._pristine[path] = weight.clone()
        self._modified.add(path)
        # Half types are summed in float32, so that only the sum is rounded, once.
        total = pristine.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for scale, delta in terms:
            total.addmm_(delta.b.to(total.dtype), delta.a.to(total.dtype), alpha=scale * delta.scaling)
        weight.copy_(total)


def _deltas_by_module(
    component: str, members: Iterable[ScaledAdapter]
) -> Mapping[str, list[tuple[float, LowRankDelta]]]:
    deltas: dict[str, list[tuple[float, LowRankDelta]]] = {}
    for member in members:
        for path, delta in member.weights.deltas[component].items():
            deltas.setdefault(path, []).append((member.scale, delta))
    return deltas

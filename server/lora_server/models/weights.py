"""An adapter's weights, ready to apply: low-rank factors by component and module.

What a reader of `adapters.formats` produces and what a model family applies. Knows nothing of files or caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from lora_server.types import ComponentSummary


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The shape of a linear module that adapters may change: its weight is (out_features, in_features)."""

    out_features: int
    in_features: int


AdapterTargets = Mapping[str, Mapping[str, LinearShape]]
"""By component (`transformer`, `text_encoder`, ...) and module path: every linear that adapters may change."""


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The change of one linear weight at scale 1: delta W = scaling * B @ A.

    Attributes:
        a: (R, in_features).
        b: (out_features, R), of the same type and device as *a*.
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski 2023, eq. 7); belongs to the weights.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    def to(self, device: torch.device) -> LowRankDelta:
        """Returns the same delta on *device*; without a copy if it is there already."""
        return LowRankDelta(self.a.to(device, non_blocking=True), self.b.to(device, non_blocking=True), self.scaling)


@dataclass(frozen=True)
class AdapterWeights:
    """All deltas of one version of an adapter, by component and module path; immutable by agreement."""

    deltas: Mapping[str, Mapping[str, LowRankDelta]]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(delta.size_bytes for modules in self.deltas.values() for delta in modules.values())

    @cached_property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(summary.max_rank for summary in self.components)

    @cached_property
    def components(self) -> tuple[ComponentSummary, ...]:
        """What is adapted in each component, sorted by component."""
        return tuple(
            ComponentSummary(
                name=component,
                num_modules=len(modules),
                min_rank=min(delta.rank for delta in modules.values()),
                max_rank=max(delta.rank for delta in modules.values()),
            )
            for component, modules in sorted(self.deltas.items())
        )

    def to(self, device: torch.device) -> AdapterWeights:
        """Returns the same weights on *device*; without copies if they are there already."""
        return AdapterWeights(
            {
                component: {path: delta.to(device) for path, delta in modules.items()}
                for component, modules in self.deltas.items()
            }
        )

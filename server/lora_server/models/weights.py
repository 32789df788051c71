"""An adapter's weights, ready to apply: low-rank factors, packed by component and by the linears' shapes.

What a reader of `adapters.formats` produces and what `models.merge` and `models.pages` apply. All factors lie in one
flat buffer, so that a version moves to the device in one copy. Knows nothing of files or caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_server.models.formulas import GroupFormula
from lora_server.models.host_memory import Allocate, ordinary_memory
from lora_server.types import ComponentSummary


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The shape of a module that adapters may change: its weight is (out_features, in_features).

    A convolution is a linear over the patches that its kernel sees: its in_features are in_channels * kh * kw, in the
    order of its weight, (out_channels, in_channels, kh, kw). All arithmetic on weights and adapters is therefore one.

    Attributes:
        kernel: (kh, kw) of a convolution, None for a linear.
    """

    out_features: int
    in_features: int
    kernel: tuple[int, int] | None = None

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of an A as files have it: (rank, in_features), or (rank, in_channels, kh, kw)."""
        if self.kernel is None:
            return rank, self.in_features
        return rank, self.in_features // (self.kernel[0] * self.kernel[1]), *self.kernel

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a B as files have it: (out_features, rank), or (out_channels, rank, 1, 1)."""
        return (self.out_features, rank) if self.kernel is None else (self.out_features, rank, 1, 1)


AdapterTargets = Mapping[str, Mapping[str, LinearShape]]
"""By component (`transformer`, `text_encoder`, ...) and module path: every module that adapters may change."""


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """All modules of one component that have one shape; a module is known by its place in *paths*."""

    shape: LinearShape
    paths: tuple[str, ...]


def linear_groups(linears: Mapping[str, LinearShape]) -> tuple[LinearGroup, ...]:
    """Groups the linears of one component by shape, both in the order of their first appearance."""
    paths: dict[LinearShape, list[str]] = {}
    for path, shape in linears.items():
        paths.setdefault(shape, []).append(path)
    return tuple(LinearGroup(shape, tuple(members)) for shape, members in paths.items())


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The change of one linear weight at scale 1, as it comes from a file: delta W = scaling * B @ A.

    Attributes:
        a: (R, in_features), a convolution's flattened.
        b: (out_features, R), of the same type and device as *a*.
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski 2023, eq. 7); belongs to the weights.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class GroupDelta:
    """The changes of some linears of one group at scale 1: delta W[k] = b[k] @ a[k].

    Attributes:
        group: Index of the group in its component's `linear_groups`.
        members: Which linears of the group, ascending; n of them.
        a: (n, R, in_features); R is the largest rank of the members, smaller ones are padded with zeros.
        b: (n, out_features, R), with the scaling in it.
    """

    group: int
    members: tuple[int, ...]
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """All changes of one version of an adapter; immutable by agreement, compared by identity.

    Attributes:
        flat: (N,), the one buffer that holds all factors.
        groups: By component: what changes in each group; the factors are views of *flat*.
        components: What is adapted in each component, sorted by component.
        formulas: By component: changes that are no low-rank product and can only be merged; views of *exact*.
        exact: (M,), the one buffer of the formulas, at least float32; None without formulas.
    """

    flat: Tensor
    groups: Mapping[str, tuple[GroupDelta, ...]]
    components: tuple[ComponentSummary, ...]
    formulas: Mapping[str, tuple[GroupFormula, ...]] = field(default_factory=dict)
    exact: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all factors."""
        return self.flat.nbytes + (0 if self.exact is None else self.exact.nbytes)

    def changes(self, component: str) -> bool:
        """Whether it changes *component* at all."""
        return bool(self.groups.get(component) or self.formulas.get(component))

    def merged_only(self, component: str) -> bool:
        """Whether some of its changes of *component* have no low-rank form, so that slots cannot apply it."""
        return bool(self.formulas.get(component))

    @cached_property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(summary.max_rank for summary in self.components)

    def component_rank(self, component: str) -> int:
        """The largest rank in *component*, 0 if it is not adapted."""
        return max((delta.rank for delta in self.groups.get(component, ())), default=0)

    def to(self, device: torch.device) -> AdapterWeights:
        """Returns a copy on *device*, made by one asynchronous transfer of each buffer on the current stream."""
        flat = self.flat.to(device, non_blocking=True)
        exact = None if self.exact is None else self.exact.to(device, non_blocking=True)

        def moved(view: Tensor) -> Tensor:
            return flat.as_strided(view.shape, view.stride(), view.storage_offset())

        def moved_exact(view: Tensor) -> Tensor:
            assert exact is not None
            return exact.as_strided(view.shape, view.stride(), view.storage_offset())

        groups = {
            component: tuple(GroupDelta(d.group, d.members, moved(d.a), moved(d.b)) for d in deltas)
            for component, deltas in self.groups.items()
        }
        formulas = {
            component: tuple(GroupFormula(f.group, f.member, f.formula.map(moved_exact)) for f in found)
            for component, found in self.formulas.items()
        }
        return AdapterWeights(flat, groups, self.components, formulas, exact)


def pack(
    deltas: Mapping[str, Mapping[str, LowRankDelta]],
    targets: AdapterTargets,
    allocate: Allocate = ordinary_memory,
) -> AdapterWeights:
    """Packs an adapter's deltas, by component and module path, into one buffer; see `Packing`."""
    ranks = {name: {path: delta.rank for path, delta in found.items()} for name, found in deltas.items()}
    dtype = next((delta.a.dtype for found in deltas.values() for delta in found.values()), torch.float32)
    packing = Packing(ranks, targets, dtype, allocate)
    for component, found in deltas.items():
        for path, delta in found.items():
            packing.fill(component, path, delta)
    return packing.weights


class Packing:
    """One buffer for all deltas of an adapter, which is filled as they are converted, so that no two copies are kept.

    Not thread-safe.
    """

    def __init__(
        self,
        ranks: Mapping[str, Mapping[str, int]],
        targets: AdapterTargets,
        dtype: torch.dtype,
        allocate: Allocate = ordinary_memory,
    ) -> None:
        """Lays out deltas of *ranks*, by component and module path, in *dtype*, in a buffer that *allocate* makes."""
        plan = [
            (component, index, group, members, max(ranks[component][group.paths[k]] for k in members))
            for component in ranks
            for index, group in enumerate(linear_groups(targets[component]))
            if (members := tuple(k for k, path in enumerate(group.paths) if path in ranks[component]))
        ]
        size = sum(len(members) * rank * sum(_features(group)) for _, _, group, members, rank in plan)
        flat = allocate(size, dtype)
        groups: dict[str, list[GroupDelta]] = {component: [] for component in ranks}
        self._places: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        offset = 0
        for component, index, group, members, rank in plan:
            delta, offset = _carve(flat, offset, group, (index, members, rank))
            groups[component].append(delta)
            for k, member in enumerate(members):
                self._places[component, group.paths[member]] = delta.a[k], delta.b[k]
        named = {name: tuple(found) for name, found in groups.items()}
        self._weights = AdapterWeights(flat, named, _summaries(ranks))

    @property
    def weights(self) -> AdapterWeights:
        """The weights; complete when every delta was filled in."""
        return self._weights

    def fill(self, component: str, path: str, delta: LowRankDelta) -> None:
        """Copies a delta, of any floating-point type, to its place; the scaling goes into B.

        Both are rounded to the buffer's type before the scaling is applied, in float64.
        """
        a, b = self._places[component, path]
        if delta.rank < a.shape[0]:
            a[delta.rank :] = 0
            b[:, delta.rank :] = 0
            a, b = a[: delta.rank], b[:, : delta.rank]
        a.copy_(delta.a)
        rounded = delta.b.to(b.dtype)
        b.copy_(rounded if delta.scaling == 1 else rounded.double() * delta.scaling)


def _features(group: LinearGroup) -> tuple[int, int]:
    return group.shape.in_features, group.shape.out_features


def _carve(
    flat: Tensor, offset: int, group: LinearGroup, place: tuple[int, tuple[int, ...], int]
) -> tuple[GroupDelta, int]:
    """Takes a stretch of *flat* from *offset* for equally shaped deltas; *place* is the group's index, members, rank.

    Returns views and the stretch's end.
    """
    index, members, rank = place
    count, (in_features, out_features) = len(members), _features(group)
    middle = offset + count * rank * in_features
    end = middle + count * out_features * rank
    a = flat[offset:middle].view(count, rank, in_features)
    b = flat[middle:end].view(count, out_features, rank)
    return GroupDelta(index, members, a, b), end


def _summaries(ranks: Mapping[str, Mapping[str, int]]) -> tuple[ComponentSummary, ...]:
    return tuple(
        ComponentSummary(component, len(found), min(found.values()), max(found.values()))
        for component, found in sorted(ranks.items())
        if found
    )

"""Merged application: a composition is written into the weights, in place, from pristine copies.

    W = W_base + sum over adapters of scale * B' A        (B' = scaling * B)
           or, where there is no low-rank form, of scale * delta(W_base)    (`models.formulas`)

Owns the pristine copies and knows what is written now. Never subtracts: subtracting drifts by rounding, copying back
gives the base bit for bit after any number of switches. One kernel or batched product writes all linears of a shape; it
adds in the accumulator's type, so half types are rounded once. Knows nothing of requests or caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import structlog
import torch
from torch import Tensor

from lora_server.models.block_scales import scale_blocks
from lora_server.models.formulas import FormulaDelta
from lora_server.models.linear_store import LinearStore
from lora_server.models.weights import AdapterWeights, GroupDelta
from lora_server.types import Digest
from lora_server.use_settings import EVERYWHERE, BlockScales, UseSettings, block_factor

_log = structlog.get_logger(__name__)
_CHUNK_BYTES = 256 * 1024 * 1024
"""Scratch memory of a write to scattered members of a group."""


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """One member of a composition: a version's weights, on the model's device, and how to apply them.

    Attributes:
        scale: The caller's multiplier; `scale_in` has the factor of a component with it.
        settings: Where it acts; its schedule is for whoever makes the composition of a step.
    """

    digest: Digest
    scale: float
    weights: AdapterWeights
    settings: UseSettings = EVERYWHERE

    def scale_in(self, component: str) -> float:
        """The scale of the adapter's deltas in *component*; 0 if it has none there."""
        if not self.weights.changes(component):
            return 0.0
        return self.scale * self.settings.component_factor(component)


CompositionKey = tuple[tuple[Digest, float, BlockScales], ...]
"""What a row uses of one component: (digest, scale, block scales), sorted; empty is the base."""


def composition_key(composition: Iterable[ScaledAdapter], component: str) -> CompositionKey:
    """Names what *composition* does to *component*: a set, without members that add nothing to it."""
    scaled = ((member.digest, member.scale_in(component), member.settings.block_scales) for member in composition)
    return tuple(sorted(each for each in scaled if each[1]))


class WeightMerger:
    """Writes compositions into the linear weights of one component. Not thread-safe: the engine thread's own.

    | invariant | |
    |---|---|
    | a group not in `_pristine` | holds its base weights |
    | `_active` is a key | every linear holds exactly base + that composition |
    | `_active` is None | a write was interrupted; the next `apply` rewrites every touched group |
    """

    def __init__(self, component: str, store: LinearStore) -> None:
        self._component = component
        self._store = store
        self._pristine: dict[int, Tensor] = {}
        self._active: CompositionKey | None = ()
        self._modified: dict[int, tuple[int, ...]] = {}
        self._uses_kernel = True

    @property
    def active(self) -> CompositionKey | None:
        """What the weights hold; None if a write was interrupted."""
        return self._active

    def invalidate(self) -> None:
        """Trusts nothing of what the weights hold besides the base: the next `apply` rewrites every touched group."""
        self._active = None

    def apply(self, composition: Sequence[ScaledAdapter]) -> bool:
        """Makes the component hold base + *composition*; an empty one is the base, bit for bit.

        A composition is a set: its order does not matter, and members at scale 0 or without deltas for this
        component add nothing. Returns whether anything was written (False: it was active already). If it raises
        (out of memory), the weights are undefined until the next call, which repairs them.
        """
        key = composition_key(composition, self._component)
        if key == self._active:
            return False
        terms, formulas = self._terms(composition), self._formulas(composition)
        self._active = None
        for group, members in list(self._modified.items()):
            written = {k for _, delta in terms.get(group, ()) for k in delta.members} | set(formulas.get(group, ()))
            if not written.issuperset(members):
                self._store.base(group).copy_(self._pristine[group])
                del self._modified[group]
        for group, deltas in terms.items():
            self._write(group, deltas)
        for group, found in formulas.items():
            self._write_formulas(group, found, terms.get(group, ()))
        self._active = key
        return True

    def _terms(self, composition: Sequence[ScaledAdapter]) -> dict[int, list[tuple[float, GroupDelta]]]:
        terms: dict[int, list[tuple[float, GroupDelta]]] = {}
        for member in sorted(composition, key=lambda each: each.digest):
            scale = member.scale_in(self._component)
            for delta in member.weights.groups.get(self._component, ()) if scale else ():
                paths = self._store.groups[delta.group].paths
                scaled = scale_blocks(delta, paths, member.settings.block_scales)
                if scaled is not None:
                    terms.setdefault(delta.group, []).append((scale, scaled))
        return terms

    def _formulas(self, composition: Sequence[ScaledAdapter]) -> dict[int, dict[int, list[tuple[float, FormulaDelta]]]]:
        """The formulas by group and member, each with its scale."""
        found: dict[int, dict[int, list[tuple[float, FormulaDelta]]]] = {}
        for adapter in sorted(composition, key=lambda each: each.digest):
            in_component = adapter.scale_in(self._component)
            for each in adapter.weights.formulas.get(self._component, ()) if in_component else ():
                path = self._store.groups[each.group].paths[each.member]
                scale = in_component * block_factor(adapter.settings.block_scales, path)
                if scale:
                    members = found.setdefault(each.group, {})
                    members.setdefault(each.member, []).append((scale, each.formula))
        return found

    def _write_formulas(
        self,
        group: int,
        formulas: Mapping[int, Sequence[tuple[float, FormulaDelta]]],
        terms: Sequence[tuple[float, GroupDelta]],
    ) -> None:
        """Writes the members that have formulas, with their low-rank terms; rounds once, from at least float32."""
        base, pristine = self._store.base(group), self._pristine_of(group)
        exact = torch.promote_types(base.dtype, torch.float32)
        for k, found in formulas.items():
            start = pristine[k].to(exact)
            total = start.clone()
            for scale, formula in found:
                total.add_(formula.delta(start), alpha=scale)
            for scale, delta in terms:
                if k in delta.members:
                    place = delta.members.index(k)
                    total.addmm_(delta.b[place].to(exact), delta.a[place].to(exact), alpha=scale)
            base[k].copy_(total)
        self._modified[group] = tuple(sorted({*self._modified.get(group, ()), *formulas}))

    def _pristine_of(self, group: int) -> Tensor:
        """The base weights of a group, copied aside before its first change."""
        if group not in self._pristine:
            self._pristine[group] = self._store.base(group).clone(memory_format=torch.contiguous_format)
        return self._pristine[group]

    def _write_by_kernel(
        self, base: Tensor, pristine: Tensor, members: tuple[int, ...], terms: tuple[Tensor, Tensor, float]
    ) -> bool:
        """Returns False if the kernel cannot be built, as without a C compiler; it is not tried again."""
        try:
            from lora_server.models.merge_kernel import write_merged

            write_merged(base, pristine, self._store.index(members), *terms)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._uses_kernel = False
            _log.warning("merged weights are written without a kernel, which takes longer", why=repr(error))
        return self._uses_kernel

    def _write(self, group: int, terms: Sequence[tuple[float, GroupDelta]]) -> None:
        base, pristine = self._store.base(group), self._pristine_of(group)
        members, *factors, alpha = _joined(terms)
        a, b = (factor.to(base.dtype) for factor in factors)  # T5 keeps some of its linears in float32
        self._modified[group] = members
        if self._uses_kernel and _has_kernel(base) and self._write_by_kernel(base, pristine, members, (b, a, alpha)):
            return
        first, last = members[0], members[-1] + 1
        if last - first == len(members):
            torch.baddbmm(pristine[first:last], b, a, alpha=alpha, out=base[first:last])
            return
        step = max(1, _CHUNK_BYTES // pristine[0].nbytes)
        for start in range(0, len(members), step):
            part = slice(start, start + step)
            index = self._store.index(members[part])
            base.index_copy_(0, index, torch.baddbmm(pristine.index_select(0, index), b[part], a[part], alpha=alpha))


def _has_kernel(base: Tensor) -> bool:
    """Whether one kernel writes such weights (`merge_kernel`); others take the products of torch."""
    return base.is_cuda and base.dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def _joined(terms: Sequence[tuple[float, GroupDelta]]) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    """Joins terms along the rank; returns (members, (n, R, in), (n, out, R), what to multiply their product with)."""
    if len(terms) == 1:
        scale, delta = terms[0]
        return delta.members, delta.a, delta.b, scale
    members = tuple(sorted({k for _, delta in terms for k in delta.members}))
    a = torch.cat([_spread(delta.a, delta.members, members) for _, delta in terms], dim=1)
    b = torch.cat([_spread(delta.b * scale, delta.members, members) for scale, delta in terms], dim=2)
    return members, a, b, 1.0


def _spread(factor: Tensor, members: tuple[int, ...], among: tuple[int, ...]) -> Tensor:
    """Puts the factors of *members* at their places *among* more, and zeros elsewhere."""
    if members == among:
        return factor
    places = {member: place for place, member in enumerate(among)}
    spread = factor.new_zeros((len(among), *factor.shape[1:]))
    spread[torch.tensor([places[member] for member in members], device=factor.device)] = factor
    return spread

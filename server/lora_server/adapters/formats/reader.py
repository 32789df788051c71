"""From an adapter's bytes to weights that can be applied: plans from the headers, then converts tensor by tensor.

Checks everything before it returns anything: what does not fit as a whole is refused, with the first offending key by
name. The only file of the formats that knows torch, with `algebra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lora_server.adapters.formats.algebra import delta_of
from lora_server.adapters.formats.header import Buffer, Limits, TensorFile
from lora_server.adapters.formats.inputs import Model, Rules, SourceFile
from lora_server.adapters.formats.keys import Role, is_by_output
from lora_server.adapters.formats.known_layouts import KnownLayouts, layout_key
from lora_server.adapters.formats.layout import Layout, understand
from lora_server.adapters.formats.layouts.part import ModuleShape
from lora_server.adapters.formats.modules import ModulePlan
from lora_server.adapters.formats.plan import Plan
from lora_server.adapters.formats.values import NOT_FINITE
from lora_server.errors import AdapterMalformedError
from lora_server.models.formulas import FormulaDelta, FormulaPacking, GroupFormula
from lora_server.models.host_memory import Allocate, ordinary_memory
from lora_server.models.weights import AdapterTargets, AdapterWeights, LowRankDelta, Packing, linear_groups
from lora_server.types import ComponentSummary

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter that was read: its weights, and what was understood of its files."""

    weights: AdapterWeights
    layout: Layout

    @property
    def plan(self) -> Plan:
        """Of which the weights are made."""
        return self.layout.plan


@dataclass(frozen=True)
class AdapterReader:
    """Reads adapters of every dialect for one served model.

    Attributes:
        targets: What adapters may change.
        denoiser: The component that a folder's own files are for.
        model: The model's name, for messages.
        dtype: Type that the factors are converted to.
        max_rank: The largest rank allowed.
        family: The model's family, for messages; empty if unknown.
        allocate: Makes the buffers that the factors lie in.
        slot_rank: The largest rank that slots can hold: LoHa and LoKr whose exact low-rank form is larger are merged.
        max_modules: The most modules allowed.
        limits: Of single files.
    """

    targets: AdapterTargets
    denoiser: str
    model: str
    dtype: torch.dtype
    max_rank: int
    family: str = ""
    allocate: Allocate = ordinary_memory
    slot_rank: int = 128
    max_modules: int = 2**31
    limits: Limits = field(default_factory=Limits)
    _known: KnownLayouts = field(default_factory=KnownLayouts, init=False, repr=False, compare=False)

    def read(self, name: str, contents: Mapping[str, Buffer]) -> AdapterWeights:
        """Converts an adapter's files, by relative path; *name* stands for it in messages.

        Raises:
            AdapterMalformedError: If the files are broken, incomplete, not finite, or use what is not supported.
            AdapterIncompatibleError: If they are another model's.
            AdapterRankTooLargeError, AdapterHeaderTooLargeError, AdapterTooManyTensorsError,
            AdapterTooManyModulesError: If a limit is exceeded.
        """
        return self.read_planned(name, contents).weights

    def read_planned(self, name: str, contents: Mapping[str, Buffer], *, allow_partial: bool = False) -> ReadAdapter:
        """The same, with what was understood. *allow_partial* leaves out tensors whose module the model has not."""
        layout = self._layout(name, contents, allow_partial=allow_partial)
        files, plan = layout.files, layout.plan
        converter = _Converter(self, name, files)
        weights = self._converted(plan, converter)
        if not all(_is_finite(buffer) for buffer in (weights.flat, weights.exact) if buffer is not None):
            converter.find_fault(plan)
            raise AdapterMalformedError(name, f"its factors times alpha / rank exceed {weights.flat.dtype}")
        return ReadAdapter(weights, layout)

    def _layout(self, name: str, contents: Mapping[str, Buffer], *, allow_partial: bool) -> Layout:
        """What headers and configurations say; taken from an adapter that said the same, if there was one of late."""
        key = layout_key(contents, allow_partial=allow_partial)
        known = self._known.find(key, name, contents) if key is not None else None
        if known is not None:
            return known
        rules = Rules(self.max_rank, self.max_modules, allow_partial)
        layout = understand(name, contents, self.served, rules, self.limits)
        if key is not None:
            self._known.keep(key, layout)
        return layout

    def _converted(self, plan: Plan, converter: _Converter) -> AdapterWeights:
        """Lays out all buffers first, and then converts into them module by module: nothing is held twice."""
        merged_only = [module for module in plan.modules if module.is_merged_only(self.slot_rank)]
        low_rank = [module for module in plan.modules if not module.is_merged_only(self.slot_rank)]
        ranks: dict[str, dict[str, int]] = {}
        for module in low_rank:
            ranks.setdefault(module.component, {}).update({part.path: module.exact_rank for part in module.parts})
        packing = Packing(ranks, self.targets, self.dtype, self.allocate)
        for module in low_rank:
            for path, delta in converter.deltas(module).items():
                assert isinstance(delta, LowRankDelta)
                packing.fill(module.component, path, delta)
        return self._with_formulas(packing.weights, merged_only, converter) if merged_only else packing.weights

    def _with_formulas(
        self, weights: AdapterWeights, modules: Sequence[ModulePlan], converter: _Converter
    ) -> AdapterWeights:
        sketches: dict[str, dict[str, FormulaDelta]] = {}
        for module in modules:
            sketches.setdefault(module.component, {}).update(_formulas(converter.deltas(module, on_meta=True)))
        placed = {component: self._placed(component, found) for component, found in sketches.items()}
        packing = FormulaPacking(
            [each for found in placed.values() for each in found],
            torch.promote_types(self.dtype, torch.float32),
            self.allocate,
        )
        for module in modules:
            for path, formula in _formulas(converter.deltas(module)).items():
                packing.fill(sketches[module.component][path], formula)
        packed = iter(packing.formulas())
        formulas = {component: tuple(next(packed) for _ in found) for component, found in placed.items()}
        summaries = _summaries(weights.components, sketches)
        return replace(weights, components=summaries, formulas=formulas, exact=packing.flat)

    @cached_property
    def served(self) -> Model:
        """The model that adapters are for; its names take milliseconds to work out."""
        catalog = {
            component: {
                path: ModuleShape(shape.out_features, shape.in_features, shape.kernel or (1, 1))
                for path, shape in shapes.items()
            }
            for component, shapes in self.targets.items()
        }
        return Model(self.model, self.denoiser, catalog, self.family)

    def _placed(self, component: str, found: Mapping[str, FormulaDelta]) -> list[GroupFormula]:
        return [
            GroupFormula(index, member, found[path])
            for index, group in enumerate(linear_groups(self.targets[component]))
            for member, path in enumerate(group.paths)
            if path in found
        ]


@dataclass(frozen=True, slots=True)
class _Converter:
    """Converts the tensors of one adapter."""

    reader: AdapterReader
    name: str
    files: Sequence[SourceFile]

    def deltas(self, module: ModulePlan, *, on_meta: bool = False) -> dict[str, LowRankDelta | FormulaDelta]:
        """The deltas of one module's parts, by path, as views of the file where no arithmetic is needed.

        *on_meta* gives their shapes alone and reads nothing.
        """
        file = self.files[module.file]
        load = _sketched if on_meta else _stored
        tensors: dict[Role, Tensor] = {
            role: load(file.tensors, key) for role, key in module.keys.items() if role is not Role.ALPHA
        }
        by_output = is_by_output(module.keys.get(Role.MAGNITUDE, ""))
        exact = self._exact_type(module)
        delta = delta_of(module.kind, tensors, module.scaling, module.rank, exact=exact, magnitude_by_output=by_output)
        return {part.path: delta.part(part.rows, self.reader.slot_rank) for part in module.parts}

    def _exact_type(self, module: ModulePlan) -> torch.dtype:
        """Products of tensors are worked out in at least float32; a plain pair needs only the model's type."""
        if module.keys.keys() <= {Role.DOWN, Role.UP, Role.ALPHA}:
            return self.reader.dtype
        return torch.promote_types(self.reader.dtype, torch.float32)

    def find_fault(self, plan: Plan) -> None:
        """Raises for the first tensor that is not finite, or not in the model's type; else returns.

        Looking at every tensor takes as long as converting it, so it is done only when something is known to be wrong:
        whatever is not finite in a file is not finite in the weights.
        """
        for module in plan.modules:
            file = self.files[module.file]
            for role, key in module.keys.items():
                stored = None if role is Role.ALPHA else _stored(file.tensors, key)
                if stored is None or _is_finite(stored.to(self._exact_type(module))):
                    continue
                beyond = f"has values beyond the range of the model's {self.reader.dtype}"
                raise self._malformed(file, beyond if _is_finite(stored.double()) else NOT_FINITE, key)

    def _malformed(self, file: SourceFile, detail: str, key: str) -> AdapterMalformedError:
        prefix = file.config.prefix if file.config is not None else ""
        return AdapterMalformedError(self.name, detail, prefix + key)


def _stored(file: TensorFile, key: str) -> Tensor:
    """A tensor as it lies in the file: a view of the file's bytes if they are writable, as torch wants, and aligned."""
    info = file.tensors[key]
    data = memoryview(file.read(info.start, info.stop))
    tensor = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=_DTYPES[info.dtype])
    if tensor.data_ptr() % tensor.element_size():
        tensor = tensor.clone()
    return tensor.view(info.shape)


def _sketched(file: TensorFile, key: str) -> Tensor:
    """A tensor of the same type and shape, without values."""
    info = file.tensors[key]
    return torch.empty(info.shape, dtype=_DTYPES[info.dtype], device="meta")


def _formulas(deltas: Mapping[str, LowRankDelta | FormulaDelta]) -> dict[str, FormulaDelta]:
    return {path: delta for path, delta in deltas.items() if isinstance(delta, FormulaDelta)}


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; many times faster than `isfinite().all()`; NaN counts as the least and the largest."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) if tensor.numel() else True


def _summaries(
    low_rank: Sequence[ComponentSummary], formulas: Mapping[str, Mapping[str, FormulaDelta]]
) -> tuple[ComponentSummary, ...]:
    """Those of the low-rank deltas, with the formulas counted in."""
    found = {summary.name: (summary.num_modules, [summary.min_rank, summary.max_rank]) for summary in low_rank}
    for component, deltas in formulas.items():
        count, ranks = found.get(component, (0, []))
        found[component] = count + len(deltas), ranks + [delta.rank for delta in deltas.values()]
    return tuple(
        ComponentSummary(name, count, min(ranks), max(ranks)) for name, (count, ranks) in sorted(found.items())
    )

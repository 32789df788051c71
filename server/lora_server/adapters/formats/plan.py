"""What an adapter's files mean, worked out from their headers alone: which tensors make which delta of which module.

No torch and no tensor data but single alphas, so `lora-server inspect` plans as the server does. Everything that is
wrong is found here or while the tensors are converted (`reader`), before anything is registered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_server.adapters.formats import dialects
from lora_server.adapters.formats.header import FLOAT_TYPES, TensorFile, TensorInfo
from lora_server.adapters.formats.keys import Role, split_key
from lora_server.adapters.formats.layouts.part import Part
from lora_server.adapters.formats.names import Catalog, NameTable, Place
from lora_server.adapters.formats.peft_config import PeftConfig, config_of
from lora_server.errors import (
    AdapterIncompatibleError,
    AdapterMalformedError,
    AdapterRankTooLargeError,
    AdapterTooManyModulesError,
)

_KINDS: Mapping[str, frozenset[Role]] = {
    "lora": frozenset({Role.DOWN, Role.UP, Role.MID}),
    "loha": frozenset(role for role in Role if role.name.startswith("HADA")),
    "lokr": frozenset(role for role in Role if role.name.startswith("LOKR")),
}
_LOKR_SIDES = ((Role.LOKR_W1, Role.LOKR_W1_A, Role.LOKR_W1_B), (Role.LOKR_W2, Role.LOKR_W2_A, Role.LOKR_W2_B))
_NEEDED = {
    "lora": (Role.DOWN, Role.UP),
    "loha": (Role.HADA_W1_A, Role.HADA_W1_B, Role.HADA_W2_A, Role.HADA_W2_B),
    "lokr": (),
}


@dataclass(frozen=True, slots=True)
class Model:
    """What adapters are matched against.

    Attributes:
        name: For messages.
        denoiser: The component that files without a component's name are for.
        catalog: Shapes by component and path; None if the model is not known.
    """

    name: str
    denoiser: str
    catalog: Catalog | None


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed: the largest rank, the most modules, and whether tensors of no module may be left out."""

    max_rank: int = 2**31
    max_modules: int = 2**31
    allow_partial: bool = False


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of tensors, with what lies beside it.

    Attributes:
        tensors: Its header.
        config: Its PEFT configuration, or None.
        component: Which component it is for, if its place says so.
    """

    tensors: TensorFile
    config: PeftConfig | None = None
    component: str | None = None


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One delta.

    Attributes:
        name: The module's name in the file.
        file: Index of the file.
        component, parts: Where it goes.
        keys: Which tensor plays which role.
        kind: `lora`, `loha` or `lokr`.
        rank, alpha: As the file has it.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        use_rslora: Whether it is.
    """

    name: str
    file: int
    component: str
    parts: tuple[Part, ...]
    keys: Mapping[Role, str]
    kind: str
    rank: int
    alpha: float
    scaling: float
    use_rslora: bool

    @property
    def has_magnitude(self) -> bool:
        """Whether it is DoRA."""
        return Role.MAGNITUDE in self.keys


@dataclass(frozen=True, slots=True)
class Plan:
    """All deltas of an adapter.

    Attributes:
        dialect: See `dialects`.
        modules: In the order of their names.
        kinds: For reports, sorted.
        unmatched: Keys of tensors that are left out.
    """

    dialect: str
    modules: tuple[ModulePlan, ...]
    kinds: tuple[str, ...]
    unmatched: tuple[str, ...] = ()


def make_plan(adapter: str, files: Sequence[SourceFile], model: Model, rules: Rules) -> Plan:
    """Plans an adapter.

    Raises:
        AdapterMalformedError: If a tensor is of no known kind, a module is incomplete, or shapes contradict each other.
        AdapterIncompatibleError: If a tensor's module is not the model's, or of another shape.
        AdapterRankTooLargeError, AdapterTooManyModulesError: If a limit is exceeded.
    """
    return _Planner(adapter, model, rules, NameTable(model.catalog, model.denoiser)).plan(files)


@dataclass(slots=True)
class _Planner:
    adapter: str
    model: Model
    rules: Rules
    names: NameTable
    unmatched: list[str] = field(default_factory=list)

    def plan(self, files: Sequence[SourceFile]) -> Plan:
        modules: list[ModulePlan] = []
        dialect = dialects.PEFT
        for index, file in enumerate(files):
            configs = self._configs(file)
            if file.config is None:
                dialect = dialects.detect(file.tensors.tensors, file.tensors.metadata)
                if dialect == dialects.PEFT:
                    detail = (
                        "has the names of a PEFT adapter, whose alpha only adapter_config.json knows; give its folder"
                    )
                    raise AdapterMalformedError(self.adapter, detail, file.tensors.name)
            grouped = self._grouped(file)
            if len(modules) + len(grouped) > self.rules.max_modules:
                raise AdapterTooManyModulesError(self.adapter, len(modules) + len(grouped), self.rules.max_modules)
            for name, (place, keys) in grouped.items():
                config = configs.get(place.component)
                modules.append(_ModulePlanner(self, file, index, config).plan(name, place, keys))
        if not modules:
            raise AdapterIncompatibleError(
                self.adapter, self.model.name, "no tensor is of any of its modules", self.unmatched[0]
            )
        self._check_disjoint(modules)
        for file in files:
            if file.config is not None:
                self._check_complete(file.config, file.component, modules)
        kinds = {_kind_label(module) for module in modules}
        return Plan(dialect, tuple(modules), tuple(sorted(kinds)), tuple(self.unmatched))

    def _configs(self, file: SourceFile) -> Mapping[str, PeftConfig]:
        """The file's PEFT configurations by component: one beside it, or those that diffusers puts into the header."""
        if file.config is not None:
            return {file.component or self.model.denoiser: file.config}
        name = file.tensors.name
        try:
            raw = dialects.diffusers_configs(file.tensors.metadata)
        except (ValueError, RecursionError) as error:
            raise AdapterMalformedError(self.adapter, f"{dialects.DIFFUSERS_CONFIGS} {error}", name) from error
        return {
            component: config_of(self.adapter, f"{component}.", {"peft_type": "LORA", **fields})
            for component, fields in raw.items()
        }

    def _grouped(self, file: SourceFile) -> dict[str, tuple[Place, dict[Role, str]]]:
        """The file's tensors by module; what has no module is refused or noted."""
        grouped: dict[str, tuple[Place, dict[Role, str]]] = {}
        places: dict[str, Place | None] = {}
        for key in sorted(file.tensors.tensors):
            parsed = split_key(key)
            if parsed is None:
                self._leave_out(
                    key, AdapterMalformedError(self.adapter, "is not a tensor of a known kind of adapter", key)
                )
                continue
            name, role = parsed
            if name not in places:
                places[name] = self.names.place(name, file.component)
            place = places[name]
            if place is None:
                detail = "the model has no such module" + _named_base(file)
                self._leave_out(key, AdapterIncompatibleError(self.adapter, self.model.name, detail, key))
                continue
            _, keys = grouped.setdefault(name, (place, {}))
            if role in keys:
                raise AdapterMalformedError(self.adapter, "is there twice", key)
            keys[role] = key
        return grouped

    def _leave_out(self, key: str, error: AdapterMalformedError | AdapterIncompatibleError) -> None:
        if not self.rules.allow_partial:
            raise error
        self.unmatched.append(key)

    def _check_disjoint(self, modules: Sequence[ModulePlan]) -> None:
        seen: dict[tuple[str, str], str] = {}
        for module in modules:
            for part in module.parts:
                other = seen.setdefault((module.component, part.path), module.name)
                if other != module.name:
                    key = next(iter(module.keys.values()))
                    detail = f"changes {part.path}, which {other} changes as well"
                    raise AdapterMalformedError(self.adapter, detail, key)

    def _check_complete(self, config: PeftConfig, component: str | None, modules: Sequence[ModulePlan]) -> None:
        """Checks that a PEFT folder's tensors are of the modules that its configuration targets, no more, no fewer."""
        component = component or self.model.denoiser
        if not config.names_modules or self.model.catalog is None:
            return
        found = {part.path: module for module in modules if module.component == component for part in module.parts}
        for path in sorted(self.model.catalog.get(component, {})):
            targeted = config.targets(path)
            if targeted and path not in found and not self.rules.allow_partial:
                detail = "the configuration targets the module, but the file has no tensors for it"
                raise AdapterMalformedError(self.adapter, detail, config.prefix + path)
            if not targeted and path in found:
                key = next(iter(found[path].keys.values()))
                detail = "the configuration does not target this tensor's module"
                raise AdapterMalformedError(self.adapter, detail, config.prefix + key)


@dataclass(frozen=True, slots=True)
class _ModulePlanner:
    """Checks one module's tensors against one another and against the model."""

    planner: _Planner
    file: SourceFile
    index: int
    config: PeftConfig | None

    def plan(self, name: str, place: Place, keys: dict[Role, str]) -> ModulePlan:
        kind = self._kind(keys)
        for role, key in keys.items():
            self._check_type(role, key)
        rank, factored = self._rank(kind, keys)
        if rank > self.planner.rules.max_rank and factored:
            raise AdapterRankTooLargeError(self.planner.adapter, rank, self.planner.rules.max_rank)
        self._check_shapes(kind, place, keys)
        path = place.parts[0].path if len(place.parts) == 1 else name
        rank, alpha, scaling = self._scaling(path, keys, rank, factored=factored)
        use_rslora = self.config is not None and self.config.use_rslora
        return ModulePlan(name, self.index, place.component, place.parts, keys, kind, rank, alpha, scaling, use_rslora)

    def _kind(self, keys: Mapping[Role, str]) -> str:
        first = next(iter(keys.values()))
        kinds = [kind for kind, roles in _KINDS.items() if roles & keys.keys()]
        if len(kinds) != 1:
            raise self._malformed("mixes kinds of adapters" if kinds else "is alone: its module has no factors", first)
        (kind,) = kinds
        for role in _NEEDED[kind]:
            if role not in keys:
                raise self._malformed(f"its {role.value} half is missing", first)
        if kind == "lokr":
            for whole, a, b in _LOKR_SIDES:
                if (whole in keys) == (a in keys or b in keys) or (a in keys) != (b in keys):
                    raise self._malformed(f"needs {whole.value}, or {a.value} and {b.value}", first)
        if (Role.HADA_T1 in keys) != (Role.HADA_T2 in keys):
            raise self._malformed("has one of hada_t1 and hada_t2", first)
        if self.config is not None:
            self._check_config(kind, keys, first)
        return kind

    def _check_config(self, kind: str, keys: Mapping[Role, str], first: str) -> None:
        assert self.config is not None
        if kind != self.config.kind:
            raise self._malformed(f"the configuration is of {self.config.kind}, this tensor of {kind}", first)
        if self.config.use_dora != (Role.MAGNITUDE in keys):
            key = keys.get(Role.MAGNITUDE, "use_dora")
            raise self._malformed("use_dora and the magnitudes of the file contradict each other", key)
        if Role.ALPHA in keys:
            raise self._malformed("the configuration has the alpha already", keys[Role.ALPHA])

    def _check_type(self, role: Role, key: str) -> None:
        info = self._info(key)
        if role is not Role.ALPHA and info.dtype not in FLOAT_TYPES:
            raise self._malformed(f"has type {info.dtype}; only floating-point types are read", key)
        if role not in (Role.ALPHA, Role.MAGNITUDE) and (len(info.shape) not in (2, 4) or 0 in info.shape):
            raise self._malformed(f"has shape {info.shape}, not a matrix or a convolution", key)

    def _rank(self, kind: str, keys: Mapping[Role, str]) -> tuple[int, bool]:
        """The rank that the tensors have, and whether there is one: a LoKr of two whole matrices has none."""
        if kind == "lora":
            return self._info(keys[Role.DOWN]).shape[0], True
        if kind == "loha":
            return self._info(keys[Role.HADA_W1_B]).shape[0], True
        for role in (Role.LOKR_W2_B, Role.LOKR_W1_B):
            if role in keys:
                return self._info(keys[role]).shape[0], True
        return min(self._matrix(keys[Role.LOKR_W2])), False

    def _scaling(self, path: str, keys: Mapping[Role, str], rank: int, *, factored: bool) -> tuple[int, float, float]:
        """Rank, alpha and scaling, each by the convention of whoever wrote the file."""
        if self.config is not None:
            expected, alpha = self.config.rank_of(path), self.config.alpha_of(path)
            if factored and rank != expected:
                raise self._malformed(
                    f"has rank {rank}, but the configuration says {expected}", next(iter(keys.values()))
                )
            return expected, alpha, alpha / (math.sqrt(expected) if self.config.use_rslora else expected)
        if Role.ALPHA not in keys:
            return rank, float(rank), 1.0
        try:
            alpha = self.file.tensors.scalar(keys[Role.ALPHA])
        except ValueError as error:
            raise self._malformed(str(error), keys[Role.ALPHA]) from error
        if not math.isfinite(alpha):
            raise self._malformed(f"is {alpha}, not a finite number", keys[Role.ALPHA])
        # LyCORIS: of two whole matrices, alpha means nothing.
        return rank, alpha, alpha / rank if factored else 1.0

    def _check_shapes(self, kind: str, place: Place, keys: Mapping[Role, str]) -> None:
        out_rows, in_columns, out_key, in_key = self._outer_shape(kind, keys)
        if not place.parts:
            return
        catalog = self.planner.model.catalog
        assert catalog is not None
        shapes = [catalog[place.component][part.path] for part in place.parts]
        out_features, in_features = sum(shape[0] for shape in shapes), shapes[0][1]
        if in_columns != in_features:
            raise self._incompatible(f"takes {in_columns} features, the module {in_features}", in_key)
        if out_rows != out_features:
            raise self._incompatible(f"gives {out_rows} features, the module {out_features}", out_key)

    def _outer_shape(self, kind: str, keys: Mapping[Role, str]) -> tuple[int, int, str, str]:
        """Rows and columns of the delta, and the keys that say so; checks the factors against one another."""
        if kind == "lora":
            up, down = keys[Role.UP], keys[Role.DOWN]
            rows, columns = self._chain(up, down, keys.get(Role.MID))
            return rows, columns, up, down
        if kind == "loha":
            first = self._chain_of(keys, Role.HADA_W1_A, Role.HADA_W1_B, Role.HADA_T1)
            second = self._chain_of(keys, Role.HADA_W2_A, Role.HADA_W2_B, Role.HADA_T2)
            if first != second:
                raise self._malformed(f"makes {second}, its first half {first}", keys[Role.HADA_W2_A])
            return *first, keys[Role.HADA_W1_A], keys[Role.HADA_W1_B]
        w1 = self._side(keys, *_LOKR_SIDES[0], None)
        w2 = self._side(keys, *_LOKR_SIDES[1], Role.LOKR_T2)
        key = keys.get(Role.LOKR_W2) or keys[Role.LOKR_W2_A]
        return w1[0] * w2[0], w1[1] * w2[1], key, keys.get(Role.LOKR_W2) or keys[Role.LOKR_W2_B]

    def _side(self, keys: Mapping[Role, str], whole: Role, a: Role, b: Role, core: Role | None) -> tuple[int, int]:
        return self._matrix(keys[whole]) if whole in keys else self._chain_of(keys, a, b, core)

    def _chain_of(self, keys: Mapping[Role, str], a: Role, b: Role, core: Role | None) -> tuple[int, int]:
        if core is None or core not in keys:
            return self._chain(keys[a], keys[b], None)
        # LyCORIS' Tucker form: the core is (R, R, kh, kw), a is (R, out) and b (R, in).
        core_shape, a_shape, b_shape = (self._info(keys[role]).shape for role in (core, a, b))
        if len(core_shape) != 4 or core_shape[:2] != (a_shape[0], b_shape[0]) or len(a_shape) + len(b_shape) != 4:
            raise self._malformed(f"is {core_shape} between {a_shape} and {b_shape}", keys[core])
        return a_shape[1], b_shape[1] * core_shape[2] * core_shape[3]

    def _chain(self, up: str, down: str, mid: str | None) -> tuple[int, int]:
        """Rows and columns of up times (mid times) down."""
        rows, up_rank = self._matrix(up)
        down_rank, columns = self._matrix(down)
        if mid is not None:
            mid_shape = self._info(mid).shape
            if len(mid_shape) != 4 or mid_shape[:2] != (up_rank, down_rank):
                raise self._malformed(f"has shape {mid_shape} between ranks {up_rank} and {down_rank}", mid)
            return rows, columns * mid_shape[2] * mid_shape[3]
        if up_rank != down_rank:
            raise self._malformed(f"has rank {up_rank}, its other half {down_rank}", up)
        return rows, columns

    def _matrix(self, key: str) -> tuple[int, int]:
        """A tensor's shape as a matrix: the kernel of a convolution counts as input."""
        shape = self._info(key).shape
        return shape[0], math.prod(shape[1:])

    def _info(self, key: str) -> TensorInfo:
        return self.file.tensors.tensors[key]

    def _malformed(self, detail: str, key: str) -> AdapterMalformedError:
        prefix = self.file.config.prefix if self.file.config is not None else ""
        return AdapterMalformedError(self.planner.adapter, detail, prefix + key)

    def _incompatible(self, detail: str, key: str) -> AdapterIncompatibleError:
        detail += _named_base(self.file)
        return AdapterIncompatibleError(self.planner.adapter, self.planner.model.name, detail, key)


def _named_base(file: SourceFile) -> str:
    base = file.config.base_model if file.config is not None else ""
    base = base or file.tensors.metadata.get("ss_base_model_version", "")
    return f" (it names {base!r} as its base model)" if base else ""


def _kind_label(module: ModulePlan) -> str:
    kind = "rslora" if module.use_rslora else module.kind
    if module.has_magnitude:
        return "dora" if kind == "lora" else f"dora+{kind}"
    return kind

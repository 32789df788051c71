"""One module of an adapter: which of its tensors make which kind of delta, of what rank and scaling. Headers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_server.adapters.formats.header import FLOAT_TYPES, TensorInfo
from lora_server.adapters.formats.inputs import Model, Rules, SourceFile
from lora_server.adapters.formats.keys import Role, is_by_output
from lora_server.adapters.formats.layouts.part import ModuleShape, Part
from lora_server.adapters.formats.names import Place
from lora_server.adapters.formats.peft_config import PeftConfig
from lora_server.errors import AdapterIncompatibleError, AdapterMalformedError, AdapterRankTooLargeError

_KINDS: Mapping[str, frozenset[Role]] = {
    "lora": frozenset({Role.DOWN, Role.UP, Role.MID}),
    "loha": frozenset(role for role in Role if role.name.startswith("HADA")),
    "lokr": frozenset(role for role in Role if role.name.startswith("LOKR")),
}
_DIMENSIONS: Mapping[Role, tuple[int, ...]] = {
    **dict.fromkeys((Role.UP, Role.DOWN, Role.LOKR_W2), (2, 4)),
    **dict.fromkeys((Role.MID, Role.HADA_T1, Role.HADA_T2, Role.LOKR_T2), (4,)),
    Role.MAGNITUDE: (1, 2, 4),
    Role.ALPHA: (0, 1, 2, 3, 4),
}
"""Dimensions that a tensor may have; else it is a matrix."""
_LOKR_SIDES = ((Role.LOKR_W1, Role.LOKR_W1_A, Role.LOKR_W1_B), (Role.LOKR_W2, Role.LOKR_W2_A, Role.LOKR_W2_B))
_NEEDED = {
    "lora": (Role.DOWN, Role.UP),
    "loha": (Role.HADA_W1_A, Role.HADA_W1_B, Role.HADA_W2_A, Role.HADA_W2_B),
    "lokr": (),
}


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One delta.

    Attributes:
        name: The module's name in the file.
        file: Index of the file.
        place: Where it goes.
        keys: Which tensor plays which role.
        kind: `lora`, `loha` or `lokr`.
        rank, alpha: As the file has it.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        use_rslora: Whether it is.
        exact_rank: Of its low-rank form: r of LoRA, r squared of LoHa, the product of both sides' of LoKr.
    """

    name: str
    file: int
    place: Place
    keys: Mapping[Role, str]
    kind: str
    rank: int
    alpha: float
    scaling: float
    use_rslora: bool
    exact_rank: int

    @property
    def component(self) -> str:
        """The component that it is for."""
        return self.place.component

    @property
    def parts(self) -> tuple[Part, ...]:
        """What of the component it changes."""
        return self.place.parts

    @property
    def has_magnitude(self) -> bool:
        """Whether it is DoRA."""
        return Role.MAGNITUDE in self.keys

    def is_merged_only(self, slot_rank: int) -> bool:
        """Whether it has no low-rank form for slots of *slot_rank*; a plain LoRA that is admitted always has one."""
        return self.has_magnitude or (self.kind != "lora" and self.exact_rank > slot_rank)


@dataclass(frozen=True, slots=True)
class ModulePlanner:
    """Checks one module's tensors against one another and against the model; *index* and *config* are its file's."""

    adapter: str
    model: Model
    rules: Rules
    file: SourceFile
    index: int
    config: PeftConfig | None

    def plan(self, name: str, place: Place, keys: Mapping[Role, str]) -> ModulePlan:
        """Plans the module *name*, whose tensors are *keys*; errors as of `plan.make_plan`."""
        kind = self._kind(keys)
        for role, key in keys.items():
            self._check_type(role, key)
        rank, factored = self._rank(kind, keys)
        if rank > self.rules.max_rank and factored:
            raise AdapterRankTooLargeError(self.adapter, rank, self.rules.max_rank)
        self._check_shapes(kind, place, keys)
        written = self.file.written(name, place) if self.config is not None else ()
        rank, alpha, scaling = self._scaling(written, keys, rank, factored=factored)
        use_rslora = self.config is not None and self.config.use_rslora
        return ModulePlan(
            name=name,
            file=self.index,
            place=place,
            keys=keys,
            kind=kind,
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            use_rslora=use_rslora,
            exact_rank=self._exact_rank(kind, keys),
        )

    def _exact_rank(self, kind: str, keys: Mapping[Role, str]) -> int:
        if kind == "lora":
            return self._matrix(keys[Role.UP])[1]
        if kind == "loha":
            halves = ((Role.HADA_T1, Role.HADA_W1_B), (Role.HADA_T2, Role.HADA_W2_B))
            return math.prod(self._inner_rank(keys, *half) for half in halves)
        cores = (None, Role.LOKR_T2)
        sides = (
            min(self._matrix(keys[whole])) if whole in keys else self._inner_rank(keys, core, b)
            for core, (whole, _, b) in zip(cores, _LOKR_SIDES, strict=True)
        )
        return math.prod(sides)

    def _inner_rank(self, keys: Mapping[Role, str], core: Role | None, b: Role) -> int:
        """The inner size of a product of two, in which a Tucker form's core is multiplied with its second."""
        return self._info(keys[core if core is not None and core in keys else b]).shape[0]

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
        if len(info.shape) not in _DIMENSIONS.get(role, (2,)) or 0 in info.shape:
            raise self._malformed(f"has shape {info.shape}, neither a matrix's nor a convolution's", key)

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

    def _scaling(
        self, written: Sequence[str], keys: Mapping[Role, str], rank: int, *, factored: bool
    ) -> tuple[int, float, float]:
        """Rank, alpha and scaling, each by the convention of whoever wrote the file."""
        if self.config is not None:
            expected, alpha = self.config.rank_of(written), self.config.alpha_of(written)
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
        catalog = self.model.catalog
        assert catalog is not None
        shapes = [catalog[place.component][part.path] for part in place.parts]
        out_features, in_features = sum(shape.out_features for shape in shapes), shapes[0].in_features
        if in_columns != in_features:
            raise self._incompatible(f"takes {in_columns} features, the module {in_features}", in_key)
        for key in keys.values():
            kernel = self._info(key).shape[2:]
            if len(kernel) == 2 and kernel not in ((1, 1), shapes[0].kernel):
                mine, theirs = " x ".join(map(str, kernel)), " x ".join(map(str, shapes[0].kernel))
                raise self._incompatible(f"has a kernel of {mine}, the module one of {theirs}", key)
        if out_rows != out_features:
            raise self._incompatible(f"gives {out_rows} features, the module {out_features}", out_key)
        if Role.MAGNITUDE in keys:
            self._check_magnitude(keys[Role.MAGNITUDE], shapes)

    def _check_magnitude(self, key: str, shapes: Sequence[ModuleShape]) -> None:
        """Checks that there is one an output, or one a feature or channel of the input, but of a fused module."""
        out_features, in_features = sum(shape.out_features for shape in shapes), shapes[0].in_features
        shape = self._info(key).shape
        count = math.prod(shape)
        by_output = is_by_output(key) or count == shape[0]
        channels = in_features // math.prod(shapes[0].kernel)
        if by_output and count == out_features:
            return
        if by_output or shape[0] != 1 or count not in (in_features, channels):
            detail = f"has {count} magnitudes for {out_features} outputs and {in_features} inputs"
            raise self._malformed(detail, key)
        if len(shapes) > 1:
            raise self._malformed("has magnitudes along the input of a fused module, which is not supported", key)

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
        return AdapterMalformedError(self.adapter, detail, prefix + key)

    def _incompatible(self, detail: str, key: str) -> AdapterIncompatibleError:
        detail += self.file.named_base
        return self.model.incompatible(self.adapter, self.file.tensors, detail, key)

"""What an adapter's files mean, worked out from their headers alone: which tensors make which delta of which module.

No torch and no tensor data but single alphas, so `lora-server inspect` plans as the server does. Everything that is
wrong is found here or while the tensors are converted (`reader`), before anything is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_server.adapters.formats import dialects
from lora_server.adapters.formats.inputs import Model, Rules, SourceFile
from lora_server.adapters.formats.keys import Role, split_key
from lora_server.adapters.formats.modules import ModulePlan, ModulePlanner
from lora_server.adapters.formats.names import NameTable, Place
from lora_server.adapters.formats.peft_config import PeftConfig, config_of
from lora_server.errors import AdapterMalformedError, AdapterTooManyModulesError


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
    return _Planner(adapter, model, rules, model.names).plan(files)


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
                modules.append(
                    ModulePlanner(self.adapter, self.model, self.rules, file, index, config).plan(name, place, keys)
                )
        if not modules:
            detail, key = "no tensor is of any of its modules", self.unmatched[0]
            raise self.model.incompatible(self.adapter, files[0].tensors, detail, key)
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
                if not self.rules.allow_partial:
                    raise AdapterMalformedError(self.adapter, "is not a tensor of a known kind of adapter", key)
                self.unmatched.append(key)
                continue
            name, role = parsed
            if name not in places:
                places[name] = self.names.place(name, file.component)
            place = places[name]
            if place is None:
                if not self.rules.allow_partial:
                    detail = "the model has no such module" + file.named_base
                    raise self.model.incompatible(self.adapter, file.tensors, detail, key)
                self.unmatched.append(key)
                continue
            _, keys = grouped.setdefault(name, (place, {}))
            if role in keys:
                raise AdapterMalformedError(self.adapter, "is there twice", key)
            keys[role] = key
        return grouped

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


def _kind_label(module: ModulePlan) -> str:
    kind = "rslora" if module.use_rslora else module.kind
    if module.has_magnitude:
        return "dora" if kind == "lora" else f"dora+{kind}"
    return kind

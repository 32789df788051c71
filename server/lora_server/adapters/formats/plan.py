"""What an adapter's files mean, worked out from their headers alone: which tensors make which delta of which module.

No torch and no tensor data but single alphas, so `lora-server inspect` plans as the server does. Everything that is
wrong is found here or while the tensors are converted (`reader`), before anything is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_server.adapters.formats import dialects
from lora_server.adapters.formats.declared import check_tensors, check_words
from lora_server.adapters.formats.inputs import Model, Rules, SourceFile
from lora_server.adapters.formats.keys import Role, changes_others, is_embedding, split_key
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
        warnings: What may be wrong with it, a sentence each.
    """

    dialect: str
    modules: tuple[ModulePlan, ...]
    kinds: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def make_plan(adapter: str, files: Sequence[SourceFile], model: Model, rules: Rules) -> Plan:
    """Plans an adapter.

    Raises:
        AdapterMalformedError: If a tensor is of no known kind, a module is incomplete, or shapes contradict each other.
        AdapterIncompatibleError: If a tensor's module is not the model's, or of another shape, or the file says that it
            is for another model.
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
    warnings: list[str] = field(default_factory=list)

    def plan(self, files: Sequence[SourceFile]) -> Plan:
        self.warnings += check_words(self.adapter, self.model, files)
        if self.rules.allow_partial:  # else the first tensor that does not fit says so
            check_tensors(self.adapter, self.model, files)
        modules: list[ModulePlan] = []
        for index, file in enumerate(files):
            own = self._modules(index, file, len(modules))
            if file.config is not None:
                self._check_complete(file.config, file.component or self.model.denoiser, own)
            modules += own
        if not modules:
            detail, key = "no tensor is of any of its modules", self.unmatched[0]
            raise self.model.incompatible(self.adapter, files[0].tensors, detail, key)
        self._check_disjoint(modules)
        kinds = tuple(sorted({_kind_label(module) for module in modules}))
        return Plan(self._dialect(files), tuple(modules), kinds, tuple(self.unmatched), tuple(self.warnings))

    def _dialect(self, files: Sequence[SourceFile]) -> str:
        bare = [file for file in files if file.config is None]
        return dialects.detect(bare[-1].tensors.tensors, bare[-1].tensors.metadata) if bare else dialects.PEFT

    def _modules(self, index: int, file: SourceFile, before: int) -> list[ModulePlan]:
        """Those of one file; *before* it, so many were found."""
        tensors = file.tensors
        if file.config is None and dialects.detect(tensors.tensors, tensors.metadata) == dialects.PEFT:
            detail = "has the names of a PEFT adapter, whose alpha only adapter_config.json knows; give its folder"
            raise AdapterMalformedError(self.adapter, detail, tensors.name)
        configs = self._configs(file)
        grouped = self._grouped(file)
        if before + len(grouped) > self.rules.max_modules:
            raise AdapterTooManyModulesError(self.adapter, before + len(grouped), self.rules.max_modules)
        modules: list[ModulePlan] = []
        for name, (place, keys) in grouped.items():
            config = file.config or configs.get(place.component)
            planner = ModulePlanner(self.adapter, self.model, self.rules, file, index, config)
            modules.append(planner.plan(name, place, keys))
        self._note_unmet(file, configs, modules)
        return modules

    def _configs(self, file: SourceFile) -> Mapping[str, PeftConfig]:
        """The file's PEFT configurations that diffusers puts into the header, by component."""
        name = file.tensors.name
        try:
            raw = dialects.diffusers_configs(file.tensors.metadata) if file.config is None else {}
        except (ValueError, RecursionError) as error:
            raise AdapterMalformedError(self.adapter, f"{dialects.DIFFUSERS_CONFIGS} {error}", name) from error
        return {
            self.names.of_configuration(word): config_of(self.adapter, f"{word}.", {"peft_type": "LORA", **fields})
            for word, fields in raw.items()
        }

    def _note_unmet(self, file: SourceFile, configs: Mapping[str, PeftConfig], modules: Sequence[ModulePlan]) -> None:
        """Warns of ranks and alphas that are for no module of the file: to peft, they change nothing."""
        asked = {None: file.config} if file.config is not None else dict(configs)
        unmet: list[str] = []
        for component, config in asked.items():
            mine = [module for module in modules if component in (None, module.component)] if config.has_unmet else []
            unmet += config.unmet([file.written(module.name, module.place) for module in mine])
        if unmet:
            more = f" and {len(unmet) - 1} more" if len(unmet) > 1 else ""
            self.warnings.append(f"{unmet[0]}{more} of the configuration match no module of the file")

    def _grouped(self, file: SourceFile) -> dict[str, tuple[Place, dict[Role, str]]]:
        """The file's tensors by module; what has no module is refused or noted."""
        grouped: dict[str, tuple[Place, dict[Role, str]]] = {}
        places: dict[str, Place | None] = {}
        for key in sorted(file.tensors.tensors):
            parsed = split_key(key)
            if parsed is None:
                self._leave_out_unknown(key)
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

    def _leave_out_unknown(self, key: str) -> None:
        """Notes a tensor that cannot be understood, if that is allowed and the others mean the same without it."""
        if is_embedding(key):
            detail = "is an embedding of new words, which is not applied"
        elif changes_others(key):
            raise AdapterMalformedError(self.adapter, "is of no known kind, and changes what other tensors mean", key)
        else:
            detail = "is not a tensor of a known kind of adapter"
        if not self.rules.allow_partial:
            raise AdapterMalformedError(self.adapter, detail, key)
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

    def _check_complete(self, config: PeftConfig, component: str, modules: Sequence[ModulePlan]) -> None:
        """Checks that a PEFT file's tensors are of the modules that its configuration targets, no more, no fewer.

        As peft, by the names that the modules have in the file: those that it lacks are named as the others are.
        """
        if not config.names_modules or self.model.catalog is None:
            return
        for module in modules:
            if not config.targets(module.place.written(module.name)):
                detail = "the configuration does not target this tensor's module"
                raise AdapterMalformedError(self.adapter, detail, config.prefix + next(iter(module.keys.values())))
        mine = [module for module in modules if module.component == component]
        missing = self._missing(config, component, mine) if mine else []
        if missing and not self.rules.allow_partial:
            detail = "the configuration targets the module, but the file has no tensors for it"
            raise AdapterMalformedError(self.adapter, detail, config.prefix + missing[0])
        if missing:
            counted = f"{len(missing)} modules, {missing[0]} first," if len(missing) > 1 else missing[0]
            self.warnings.append(f"the configuration targets {counted} for which the file has no tensors")

    def _missing(self, config: PeftConfig, component: str, modules: Sequence[ModulePlan]) -> list[str]:
        """The modules of *component* that the configuration targets and that are none of *modules*, as those named."""
        found = {part.path for module in modules for part in module.parts}
        name, dotted = modules[0].name, modules[0].place.dotted
        prefix = name.removesuffix(dotted) if name.endswith(dotted) else ""
        layout = self.names.same_layout(component, [module.place.dotted for module in modules])
        return [
            name
            for name, parts in sorted(layout.items())
            if not found.intersection(part.path for part in parts)
            and config.targets(Place(component, parts, name, name).written(prefix + name))
        ]


def _kind_label(module: ModulePlan) -> str:
    kind = "rslora" if module.use_rslora else module.kind
    if module.has_magnitude:
        return "dora" if kind == "lora" else f"dora+{kind}"
    return kind

"""What a PEFT configuration says of the weights: kind, rank and alpha of each module, and which modules it targets.

Follows peft 0.17 to 0.21 without importing it, so that a report needs no torch (a test holds the tables of fields
against peft's own classes). Every field that could change the result is understood or refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from lora_server.adapters.formats.patterns import Matcher, PatternError, PatternValues, names_end_of
from lora_server.adapters.formats.wrappers import without_wrappers_in_pattern
from lora_server.adapters.source import CONFIG_FILE
from lora_server.errors import AdapterMalformedError

KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_ALPHA_FIELD = {"lora": "lora_alpha", "loha": "alpha", "lokr": "alpha"}
# Fields that decide the result and are understood, and fields that do not change what the weights mean.
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform",
}  # fmt: skip
IRRELEVANT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "loftq_config", "megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying",
    "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "decompose_both", "decompose_factor",
    "eva_config", "corda_config", "lora_ga_config", "use_effective_conv2d", "runtime_config",
}  # fmt: skip
# Ways to initialise that leave the base weights alone, as peft spells them; MiCA freezes B, and saves it all the same.
_PLAIN_INITIALISATIONS = ("gaussian", "orthogonal", "eva", "mica")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_SHOWN_CHARS = 200
_MAX_RANK = 2**31
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """One component's configuration, checked.

    Attributes:
        adapter: Stands for the adapter in messages.
        prefix: Of the component's files, for messages.
        kind: `lora`, `loha` or `lokr`.
        rank, alpha: Of modules that no pattern names.
        matcher: Of its patterns, within bounds; for one thread.
    """

    adapter: str
    prefix: str
    kind: str
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: PatternValues[int]
    alpha_pattern: PatternValues[float]
    target_modules: str | frozenset[str] | None
    exclude_modules: str | frozenset[str] | None
    layers: tuple[int, ...] | None
    base_model: str
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)

    def rank_of(self, names: Sequence[str]) -> int:
        """The rank of a module, by the names that its writer may have had for it."""
        return self._bounded("rank_pattern", lambda: self.rank_pattern.find(names, self.rank, self.matcher))

    def alpha_of(self, names: Sequence[str]) -> float:
        """The alpha of a module."""
        return self._bounded("alpha_pattern", lambda: self.alpha_pattern.find(names, self.alpha, self.matcher))

    @property
    def has_unmet(self) -> bool:
        """Whether there may be patterns that match no module, after all have been asked for."""
        return self.rank_pattern.has_unmet or self.alpha_pattern.has_unmet

    def unmet(self, modules: Sequence[Sequence[str]]) -> list[str]:
        """The patterns of ranks and alphas that match none of *modules*, as `FIELD 'PATTERN'`."""
        ranks = self._bounded("rank_pattern", lambda: self.rank_pattern.unmet(modules, self.matcher))
        alphas = self._bounded("alpha_pattern", lambda: self.alpha_pattern.unmet(modules, self.matcher))
        fields = [("rank_pattern", each) for each in ranks] + [("alpha_pattern", each) for each in alphas]
        return [f"{self.prefix}{name} {pattern[:_MAX_SHOWN_CHARS]!r}" for name, pattern in fields]

    @property
    def names_modules(self) -> bool:
        """Whether the configuration says which modules it is for, in a way that can be checked."""
        return self.target_modules is not None and self.target_modules != "all-linear"

    def targets(self, names: Sequence[str]) -> bool:
        """As peft's check_target_module_exists, but with a bound on the time that a regular expression may take."""
        if self.exclude_modules and any(self._is_of(self.exclude_modules, x, "exclude_modules") for x in names):
            return False
        return self.target_modules is not None and any(self._is_target(name) for name in names)

    def _is_target(self, name: str) -> bool:
        wanted = self.target_modules
        assert wanted is not None
        if not self._is_of(wanted, name, "target_modules"):
            return False
        if not self.layers or isinstance(wanted, str) or name in wanted:
            return True  # peft asks for the layer only where the end of a name was listed
        # peft's own rule without layers_pattern: the first number that follows at least two parts of the name.
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return match is not None and int(match[1]) in self.layers

    def _is_of(self, patterns: str | frozenset[str], name: str, field: str) -> bool:
        if isinstance(patterns, str):
            return self._bounded(field, lambda: self.matcher.fullmatch(patterns, name))
        return names_end_of(patterns, name)

    def _bounded(self, field: str, match: Callable[[], T]) -> T:
        """What *match* returns; a pattern of *field* that cannot be used is the adapter's fault."""
        try:
            return match()
        except PatternError as error:
            raise AdapterMalformedError(self.adapter, str(error), self.prefix + field) from error


def parse_config(adapter: str, prefix: str, data: bytes) -> PeftConfig:
    """Reads `adapter_config.json`; AdapterMalformedError names the field that is wrong or not understood."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterMalformedError(adapter, "is not JSON", prefix + CONFIG_FILE) from error
    if not isinstance(raw, dict):
        raise AdapterMalformedError(adapter, "is not a JSON object", prefix + CONFIG_FILE)
    return config_of(adapter, prefix, raw)


def config_of(adapter: str, prefix: str, raw: Mapping[str, Any]) -> PeftConfig:
    """Checks a configuration that has been parsed."""
    return _Checker(adapter, prefix, raw).config()


@dataclass(frozen=True, slots=True)
class _Checker:
    """Checks one configuration field by field."""

    adapter: str
    prefix: str
    raw: Mapping[str, Any]

    def config(self) -> PeftConfig:
        kind = KINDS.get(str(self.raw.get("peft_type")))
        if kind is None:
            allowed = ", ".join(KINDS)
            shown = repr(self.raw.get("peft_type"))[:_MAX_SHOWN_CHARS]
            self._fail("peft_type", f"{shown} adapters are not supported, only {allowed}")
        for key in sorted(self.raw):
            self._check_field(key, self.raw[key])
        alpha_field = _ALPHA_FIELD[kind]
        base_model = self.raw.get("base_model_name_or_path")
        return PeftConfig(
            adapter=self.adapter,
            prefix=self.prefix,
            kind=kind,
            rank=self._rank("r", self.raw.get("r", 8)),
            alpha=self._alpha(alpha_field, self.raw.get(alpha_field, 8)),
            use_rslora=self._bool("use_rslora"),
            use_dora=self._bool("use_dora"),
            rank_pattern=self._values("rank_pattern", self._rank),
            alpha_pattern=self._values("alpha_pattern", self._alpha),
            target_modules=self._modules("target_modules"),
            exclude_modules=self._modules("exclude_modules"),
            layers=self._layers(),
            base_model=base_model if isinstance(base_model, str) else "",
        )

    def _fail(self, key: str, detail: str) -> NoReturn:
        raise AdapterMalformedError(self.adapter, detail, self.prefix + key)

    def _check_field(self, key: str, value: Any) -> None:
        if key == "layers_pattern" and value and self.raw.get("layers_to_transform") is not None:
            self._fail(key, "is not supported; name the modules in target_modules")
        if key == "use_effective_conv2d" and value:
            # Then the tensors of convolutions are factored otherwise; their shapes say so and are followed.
            return
        if key in UNDERSTOOD or key in IRRELEVANT or not value or (key == "bias" and value == "none"):
            return
        if key == "init_lora_weights":
            self._check_initialisation(value)
            return
        self._fail(key, "this feature is not supported")

    def _check_initialisation(self, value: Any) -> None:
        """Of most ways, nothing is left in the file; some change the base, so that the file is of another base."""
        word = value.lower() if isinstance(value, str) else ""
        if value is True or word in _PLAIN_INITIALISATIONS:
            return
        shown = repr(value)[:_MAX_SHOWN_CHARS]
        detail = f"{shown} is not known, so nobody can tell whether it changes the base weights"
        if word.startswith(_CHANGE_THE_BASE):
            detail = f"{shown} changes the base weights; save it with peft's path_initial_model_for_weight_conversion"
        self._fail("init_lora_weights", detail)

    def _rank(self, key: str, rank: Any) -> int:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < _MAX_RANK:
            self._fail(key, f"{repr(rank)[:_MAX_SHOWN_CHARS]} is not a positive whole number")
        return int(rank)

    def _alpha(self, key: str, alpha: Any) -> float:
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not _is_finite(alpha):
            self._fail(key, f"{repr(alpha)[:_MAX_SHOWN_CHARS]} is not a finite number")
        return float(alpha)

    def _bool(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            self._fail(key, "is not true or false")
        return bool(value)

    def _values(self, key: str, check: Callable[[str, Any], T]) -> PatternValues[T]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self._fail(key, "is not an object")
        values: dict[str, T] = {}
        for pattern, each in value.items():
            values.setdefault(without_wrappers_in_pattern(pattern), check(key, each))
        return PatternValues(values)

    def _modules(self, key: str) -> str | frozenset[str] | None:
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return None if value is None else without_wrappers_in_pattern(value)
        if not isinstance(value, list):
            self._fail(key, "is neither a list nor a regular expression")
        if not all(isinstance(item, str) for item in value):
            self._fail(key, "is not a list of strings")
        return frozenset(without_wrappers_in_pattern(item) for item in value)

    def _layers(self) -> tuple[int, ...] | None:
        layers = self.raw.get("layers_to_transform")
        listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in listed):
            self._fail("layers_to_transform", "is neither a whole number nor a list of those")
        return tuple(listed) or None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False

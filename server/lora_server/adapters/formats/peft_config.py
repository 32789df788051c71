"""What a PEFT configuration says of the weights: kind, rank and alpha of each module, and which modules it targets.

Follows peft 0.17 to 0.21 without importing it, so that a report needs no torch (a test holds the tables of fields
against peft's own classes). Every field that could change the result is understood or refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_server.adapters.formats.patterns import Matcher, PatternError, names_end_of
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
    "eva_config", "use_effective_conv2d", "runtime_config",
}  # fmt: skip
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


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
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | frozenset[str] | None
    exclude_modules: str | frozenset[str] | None
    layers: tuple[int, ...] | None
    base_model: str
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)

    def rank_of(self, path: str) -> int:
        """The rank of a module."""
        value: int = self._pattern_value(self.rank_pattern, path, self.rank)
        return value

    def alpha_of(self, path: str) -> float:
        """The alpha of a module."""
        value: float = self._pattern_value(self.alpha_pattern, path, self.alpha)
        return value

    @property
    def names_modules(self) -> bool:
        """Whether the configuration says which modules it is for, in a way that can be checked."""
        return self.target_modules is not None and self.target_modules != "all-linear"

    def targets(self, path: str) -> bool:
        """As peft's check_target_module_exists, but with a bound on the time that a regular expression may take."""
        if self.exclude_modules and self._names(self.exclude_modules, path, "exclude_modules"):
            return False
        if self.target_modules is None or not self._names(self.target_modules, path, "target_modules"):
            return False
        if not self.layers:
            return True
        # peft's own rule without layers_pattern: the first number that follows at least two parts of the path.
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return match is not None and int(match[1]) in self.layers

    def _names(self, patterns: str | frozenset[str], path: str, field: str) -> bool:
        if isinstance(patterns, str):
            return self._fullmatch(patterns, path, field)
        return names_end_of(patterns, path)

    def _pattern_value(self, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
        """As peft's get_pattern_key: the first pattern that is the path's end, at a dot, wins."""
        for pattern, value in patterns.items():
            if self._fullmatch(rf"(.*\.)?({pattern})", path, "rank_pattern or alpha_pattern"):
                return value
        return default

    def _fullmatch(self, pattern: str, path: str, field: str) -> bool:
        try:
            return self.matcher.fullmatch(pattern, path)
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
            self._fail("peft_type", f"{self.raw.get('peft_type')!r} adapters are not supported, only {allowed}")
        assert kind is not None
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
            rank_pattern={k: self._rank("rank_pattern", v) for k, v in self._mapping("rank_pattern").items()},
            alpha_pattern={k: self._alpha("alpha_pattern", v) for k, v in self._mapping("alpha_pattern").items()},
            target_modules=self._modules("target_modules"),
            exclude_modules=self._modules("exclude_modules"),
            layers=self._layers(),
            base_model=base_model if isinstance(base_model, str) else "",
        )

    def _fail(self, key: str, detail: str) -> None:
        raise AdapterMalformedError(self.adapter, detail, self.prefix + key)

    def _check_field(self, key: str, value: Any) -> None:
        if key == "layers_pattern" and value:
            self._fail(key, "is not supported; name the modules in target_modules")
        if key == "use_effective_conv2d" and value:
            # Then the tensors of convolutions are factored otherwise; their shapes say so and are followed.
            return
        if key in UNDERSTOOD or key in IRRELEVANT or not value or (key == "bias" and value == "none"):
            return
        if key == "init_lora_weights":
            if not any(value is each or value == each for each in _PLAIN_INITIALISATIONS):
                self._fail(key, f"{value!r} changes the base weights and is not supported")
            return
        self._fail(key, "this feature is not supported")

    def _rank(self, key: str, rank: Any) -> int:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            self._fail(key, f"{rank!r} is not a positive whole number")
        return int(rank)

    def _alpha(self, key: str, alpha: Any) -> float:
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not _is_finite(alpha):
            self._fail(key, f"{alpha!r} is not a finite number")
        return float(alpha)

    def _bool(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            self._fail(key, "is not true or false")
        return bool(value)

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self._fail(key, "is not an object")
        return dict(value)

    def _modules(self, key: str) -> str | frozenset[str] | None:
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, (list, tuple, set)):
            self._fail(key, "is neither a list nor a regular expression")
        if not all(isinstance(item, str) for item in value):
            self._fail(key, "is not a list of strings")
        return frozenset(value)

    def _layers(self) -> tuple[int, ...] | None:
        layers = self.raw.get("layers_to_transform")
        if layers is None or isinstance(layers, int):
            return None if layers is None else (layers,)
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            self._fail("layers_to_transform", "is not a list of whole numbers")
        found: Iterable[int] = layers
        return tuple(found)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False

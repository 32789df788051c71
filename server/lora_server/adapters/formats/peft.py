"""The PEFT format: adapter_config.json and adapter_model.safetensors, turned into low-rank deltas.

Reads only what it is given as bytes and checks everything before it returns anything: what does not fit as a whole is
refused, with the first offending key by name. Configuration is read through peft's own classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from lora_server.adapters.formats.patterns import Matcher, PatternError, names_end_of
from lora_server.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from lora_server.errors import AdapterIncompatibleError, AdapterMalformedError, AdapterRankTooLargeError
from lora_server.models.weights import AdapterTargets, AdapterWeights, LinearShape, LowRankDelta, pack

_PREFIX = "base_model.model."
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_TENSORS = 16_384  # FLUX has some 1,000 with every linear adapted; each costs memory that its file does not show
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fields that decide the result and are understood, and fields that do not change what the weights mean.
_UNDERSTOOD = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform",
}  # fmt: skip
_IRRELEVANT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "loftq_config", "megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying",
}  # fmt: skip
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class PeftReader:
    """Reads PEFT adapters for one served model.

    Attributes:
        targets: What adapters may change.
        denoiser: The component that a folder's own files are for.
        model: The model's name, for messages.
        dtype: Type that the factors are converted to.
        max_rank: The largest rank allowed.
        pin_memory: Whether the factors lie in page-locked memory, from which they can go to a CUDA device at any time.
    """

    targets: AdapterTargets
    denoiser: str
    model: str
    dtype: torch.dtype
    max_rank: int
    pin_memory: bool = False

    def read(self, name: str, contents: Mapping[str, bytes]) -> AdapterWeights:
        """Converts an adapter's files, by relative path; *name* stands for it in messages.

        Raises:
            AdapterMalformedError: If the files are broken, incomplete, not finite, or use what is not supported.
            AdapterIncompatibleError: If they are another model's.
            AdapterRankTooLargeError: If a rank exceeds the limit.
        """
        folders = sorted({path.rpartition("/")[0] for path in contents})
        deltas = {}
        for folder in folders:
            component = folder or self.denoiser
            if component in deltas:
                raise AdapterMalformedError(name, f"adapts {component} twice", folder)
            prefix = f"{folder}/" if folder else ""
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                if prefix + file not in contents:
                    raise AdapterMalformedError(name, "the file is missing", prefix + file)
            part = _ComponentReader(self, name, component, prefix)
            deltas[component] = part.read(contents[prefix + CONFIG_FILE], contents[prefix + WEIGHTS_FILE])
        weights = pack(deltas, self.targets, pin_memory=self.pin_memory)
        if not torch.isfinite(weights.flat).all():
            raise AdapterMalformedError(name, f"its factors times alpha / rank exceed {self.dtype}", WEIGHTS_FILE)
        return weights


@dataclass(frozen=True, slots=True)
class _ComponentReader:
    """Reads one PEFT folder, for one component."""

    reader: PeftReader
    name: str
    component: str
    prefix: str
    matcher: Matcher = field(default_factory=Matcher)

    def read(self, config_bytes: bytes, weight_bytes: bytes) -> dict[str, LowRankDelta]:
        config = self._config(config_bytes)
        pairs = self._pairs(self._tensors(weight_bytes), config)
        self._check_complete(config, pairs)
        return {path: self._delta(path, pair, config) for path, pair in pairs.items()}

    def _config(self, data: bytes) -> LoraConfig:
        """Reads the configuration through peft; what could change the result and is not understood is refused."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._malformed("is not JSON", CONFIG_FILE) from error
        if not isinstance(raw, dict):
            raise self._malformed("is not a JSON object", CONFIG_FILE)
        if raw.get("peft_type") != "LORA":
            raise self._malformed(f"{raw.get('peft_type')!r} adapters are not supported, only LORA", "peft_type")
        defaults = LoraConfig()
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        for key in sorted(raw):
            self._check_field(key, raw[key], getattr(defaults, key, None))
        try:
            fields = _UNDERSTOOD | {"base_model_name_or_path"}
            config = LoraConfig(**{key: value for key, value in raw.items() if key in known & fields})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise self._malformed(f"peft refuses it ({error})", CONFIG_FILE) from error
        self._check_numbers(config)
        return config

    def _check_field(self, key: str, value: Any, default: Any) -> None:
        if key in _UNDERSTOOD or key in _IRRELEVANT:
            if key == "layers_pattern" and value:
                raise self._malformed("is not supported; name the modules in target_modules", key)
            return
        if key == "init_lora_weights":
            if value not in _PLAIN_INITIALISATIONS:
                raise self._malformed(f"{value!r} changes the base weights and is not supported", key)
        elif key == "eva_config" or not value or value == default or (key == "bias" and value == "none"):
            return
        else:
            raise self._malformed("this feature is not supported", key)

    def _check_numbers(self, config: LoraConfig) -> None:
        ranks = [
            ("r", config.r),
            *(("rank_pattern", rank) for rank in _mapping(config.rank_pattern).values()),
        ]
        for key, rank in ranks:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise self._malformed(f"{rank!r} is not a positive whole number", key)
        alphas = [("lora_alpha", config.lora_alpha)]
        alphas += [("alpha_pattern", alpha) for alpha in _mapping(config.alpha_pattern).values()]
        for key, alpha in alphas:
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not _is_finite(alpha):
                raise self._malformed(f"{alpha!r} is not a finite number", key)
        if not isinstance(config.use_rslora, bool):
            raise self._malformed("is not true or false", "use_rslora")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(config, key), dict):
                raise self._malformed("is not an object", key)
        for key in ("target_modules", "exclude_modules"):
            value = getattr(config, key)
            if isinstance(value, set) and not all(isinstance(item, str) for item in value):
                raise self._malformed("is not a list of strings", key)
            if not isinstance(value, (set, str, type(None))):
                raise self._malformed("is neither a list nor a regular expression", key)
        layers = config.layers_to_transform
        layer_list = layers if isinstance(layers, list) else [layers]
        if layers is not None and not all(isinstance(layer, int) for layer in layer_list):
            raise self._malformed("is not a list of whole numbers", "layers_to_transform")

    def _tensors(self, data: bytes) -> dict[str, torch.Tensor]:
        self._check_header(data)
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, OverflowError) as error:
            raise self._malformed(f"is not a valid safetensors file ({error})", WEIGHTS_FILE) from error
        if not tensors:
            raise self._malformed("has no tensors", WEIGHTS_FILE)
        return tensors

    def _check_header(self, data: bytes) -> None:
        """Bounds the header before the library parses it, and checks what it leaves to its callers."""
        if len(data) < 8:
            raise self._malformed("is cut short", WEIGHTS_FILE)
        (length,) = struct.unpack_from("<Q", data)
        if length > min(len(data) - 8, _MAX_HEADER_BYTES):
            raise self._malformed("is cut short, or its header is too long", WEIGHTS_FILE)
        if data.count(b'"data_offsets"', 8, 8 + length) > _MAX_TENSORS:
            raise self._malformed(f"has more than {_MAX_TENSORS} tensors", WEIGHTS_FILE)

    def _pairs(self, tensors: Mapping[str, torch.Tensor], config: LoraConfig) -> dict[str, _Pair]:
        """Groups tensors by module, each matched to a module of the model."""
        halves: dict[str, dict[str, str]] = {}
        for key in sorted(tensors):
            path, half = self._split(key)
            if path not in self._modules:
                raise self._incompatible(config, "the model has no such linear module", key)
            if half in halves.setdefault(path, {}):
                raise self._malformed("is there twice", key)
            halves[path][half] = key
        for path in sorted(halves):
            if len(halves[path]) < 2:
                (half, key), missing = next(iter(halves[path].items())), "AB"
                raise self._malformed(f"its lora_{missing.replace(half, '')} half is missing", key)
        return {
            path: _Pair(keys["A"], tensors[keys["A"]], keys["B"], tensors[keys["B"]]) for path, keys in halves.items()
        }

    def _split(self, key: str) -> tuple[str, str]:
        """Splits `base_model.model.PATH.lora_A[.ADAPTER].weight` into PATH and `A`."""
        body = key.removeprefix(_PREFIX)
        for half in "AB":
            path, found, rest = body.rpartition(f".lora_{half}.")
            if found and (rest == "weight" or (rest.endswith(".weight") and rest.count(".") == 1)):
                return path, half
        if any(mark in key for mark in ("lora_magnitude_vector", "hada_", "lokr_", "lora_embedding_")):
            raise self._malformed("this kind of adapter is not supported", key)
        raise self._malformed("is not a LoRA tensor of a linear module", key)

    def _delta(self, path: str, pair: _Pair, config: LoraConfig) -> LowRankDelta:
        """Checks one pair and converts it."""
        shape = self._modules[path]
        for key, tensor in ((pair.a_key, pair.a), (pair.b_key, pair.b)):
            if tensor.dtype not in _WEIGHT_TYPES:
                raise self._malformed(f"has type {tensor.dtype}; only float32, float16 and bfloat16 are read", key)
            if tensor.ndim != 2 or 0 in tensor.shape:
                raise self._malformed(f"has shape {tuple(tensor.shape)}, not a matrix", key)
        rank = pair.a.shape[0]
        if rank > self.reader.max_rank:
            raise AdapterRankTooLargeError(self.name, rank, self.reader.max_rank)
        self._check_shapes(pair, shape, config)
        expected = self._pattern_value(config.rank_pattern, path, config.r)
        if rank != expected:
            raise self._malformed(f"has rank {rank}, but the configuration says {expected}", pair.a_key)
        alpha = self._pattern_value(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        a, b = self._convert(pair.a_key, pair.a), self._convert(pair.b_key, pair.b)
        return LowRankDelta(a, b, scaling)

    def _check_shapes(self, pair: _Pair, shape: LinearShape, config: LoraConfig) -> None:
        if pair.a.shape[1] != shape.in_features:
            raise self._incompatible(
                config, f"takes {pair.a.shape[1]} features, the module {shape.in_features}", pair.a_key
            )
        if pair.b.shape[0] != shape.out_features:
            raise self._incompatible(
                config, f"gives {pair.b.shape[0]} features, the module {shape.out_features}", pair.b_key
            )
        if pair.b.shape[1] != pair.a.shape[0]:
            raise self._malformed(f"has rank {pair.b.shape[1]}, its other half {pair.a.shape[0]}", pair.b_key)

    def _convert(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        converted = tensor.to(self.reader.dtype)
        if not bool(torch.isfinite(converted).all()):
            what = (
                "has values that are not finite"
                if not bool(torch.isfinite(tensor).all())
                else (f"has values beyond the range of the model's {self.reader.dtype}")
            )
            raise self._malformed(what, key)
        return converted.contiguous().clone() if converted.data_ptr() == tensor.data_ptr() else converted.contiguous()

    def _check_complete(self, config: LoraConfig, pairs: Mapping[str, _Pair]) -> None:
        """Checks that the tensors are those of the modules that the configuration targets, no more and no fewer."""
        if config.target_modules is None or config.target_modules == "all-linear":
            return
        for path in sorted(self._modules):
            targeted = self._is_targeted(config, path)
            if targeted and path not in pairs:
                raise self._malformed("the configuration targets the module, but the file has no tensors for it", path)
            if not targeted and path in pairs:
                raise self._malformed("the configuration does not target this tensor's module", pairs[path].a_key)

    def _is_targeted(self, config: LoraConfig, path: str) -> bool:
        """As peft's check_target_module_exists, but with a bound on the time that a regular expression may take."""
        if config.exclude_modules and self._names(config.exclude_modules, path, "exclude_modules"):
            return False
        if not self._names(config.target_modules, path, "target_modules"):
            return False
        layers = config.layers_to_transform
        if layers is None or layers == []:
            return True
        # peft's own rule without layers_pattern: the first number that follows at least two parts of the path.
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])

    def _names(self, patterns: str | set[str], path: str, field: str) -> bool:
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
            raise self._malformed(str(error), field) from error

    @property
    def _modules(self) -> Mapping[str, LinearShape]:
        return self.reader.targets[self.component]

    def _malformed(self, detail: str, key: str) -> AdapterMalformedError:
        return AdapterMalformedError(self.name, detail, self.prefix + key)

    def _incompatible(self, config: LoraConfig, detail: str, key: str) -> AdapterIncompatibleError:
        base = getattr(config, "base_model_name_or_path", None)
        named = f" (it names {base!r} as its base model)" if isinstance(base, str) and base else ""
        return AdapterIncompatibleError(self.name, self.reader.model, detail + named, self.prefix + key)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two halves of one module's delta, with their keys."""

    a_key: str
    a: torch.Tensor
    b_key: str
    b: torch.Tensor


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

"""What a model's weights say of themselves, by the names of tensors and by the header: obeyed, or refused by name.

Tensors such as `v_pred` are empty: their names are the message. Knows names and types; no torch, no tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_NOISE, _VELOCITY = "epsilon", "v_prediction"
_PREDICTIONS = {
    "epsilon": _NOISE, "eps": _NOISE, "noise": _NOISE,
    "v": _VELOCITY, "vpred": _VELOCITY, "velocity": _VELOCITY, "vprediction": _VELOCITY,
}  # fmt: skip
"""What people write, in letters only, by what diffusers calls it."""
_PREDICTS = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})
"""Pipelines whose networks may predict noise or velocity; a flow has no choice."""

_QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_\d|_inv)?|input_scale|comfy_quant|SCB|weight_format"
    r"|weight_zero_point|qweight|qzeros|g_idx|wscales|wtscale|wcscales|smooth_factor(_orig)?|.*_quantizer\..*"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|_data|_scale))$"
)
_EDM = re.compile(r"(^|\.)(edm_mean|edm_std|edm_vpred\.sigma_(max|min))$")
_EMA = re.compile(r"^model_ema\.(?!(decay|num_updates)$)")
_NO_NUMBERS_FOR_WEIGHTS = re.compile(r"[IU]\d+|BOOL|F4|F6_\w+")

_ARCHITECTURES = (
    (r"stable-diffusion-xl|sdxl", "StableDiffusionXLPipeline"),
    (r"stable-diffusion-v?3|sd3", "StableDiffusion3Pipeline"),
    (r"stable-diffusion-v[12]|sd_v[12]", "StableDiffusionPipeline"),
    (r"flux[.-]?1", "FluxPipeline"),
    (r"flux[.-]?2", "Flux2Pipeline"),
    (r"qwen-image", "QwenImagePipeline"),
    (r"z-image", "ZImagePipeline"),
)
"""How the fields of a header that name the architecture begin (SAI's model specification, kohya), by pipeline."""
_OTHER_TASKS = re.compile(r"/|inpaint|refiner|edit|pix2pix|depth|canny|fill|upscal|unclip|control|lora")
_PREDICTION_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_ARCHITECTURE_FIELDS = ("modelspec.architecture", "ss_base_model_version")


@dataclass(frozen=True, slots=True)
class Declared:
    """What was said; nothing, as a rule.

    Attributes:
        prediction_type: What the network predicts, as diffusers' schedulers call it; None if nothing is said.
        zero_terminal_snr: Whether it was trained with noise levels that end in noise alone (Lin et al. 2023).
        ema: Whether there is a second set of weights, averaged over the training.
        messages: Tensors that are no weights, but say the above.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    ema: bool = False
    messages: frozenset[str] = frozenset()


def read_header(file: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, str]]:
    """Reads names with types, names with shapes, and the metadata of a safetensors file.

    Raises:
        ValueError: If it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            types = {name: str(each.get_dtype()) for name, each in slices.items()}
            return types, {name: tuple(each.get_shape()) for name, each in slices.items()}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is not a valid safetensors file ({error})") from error


def declared(types: Mapping[str, str], metadata: Mapping[str, str], pipeline_class: str) -> Declared:
    """Returns what the tensors (by name, with the type) and the metadata of a file of *pipeline_class* say.

    Raises:
        ValueError: If they say what cannot be served, contradict each other, or name another model; the message has
            the name of the tensor or field.
    """
    refuse_quantised(types, metadata)
    if (edm := _first(types, _EDM)) is not None:
        raise ValueError(f"the tensor {edm} says that it was trained by EDM, whose noise levels are not served")
    _check_architecture(metadata, pipeline_class)
    flags = {name: name.rpartition(".")[2] for name in types if name.rpartition(".")[2] in ("v_pred", "ztsnr")}
    predictions = [(f"the tensor {name}", _VELOCITY) for name, flag in flags.items() if flag == "v_pred"]
    predictions += _predictions_of_header(metadata)
    kinds = {kind for _, kind in predictions}
    if len(kinds) > 1:
        raise ValueError("; ".join(f"{by} says {kind}" for by, kind in predictions) + ": they contradict each other")
    zero_snr = "ztsnr" in flags.values() or _is_true(metadata.get("ss_zero_terminal_snr"))
    if (kinds or zero_snr) and pipeline_class not in _PREDICTS:
        by = predictions[0][0] if predictions else "ztsnr"
        raise ValueError(f"{by} says how a diffusion network predicts, which a {pipeline_class} has no choice in")
    return Declared(next(iter(kinds), None), zero_snr, _first(types, _EMA) is not None, frozenset(flags))


def refuse_quantised(types: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Refuses weights that are not numbers as they stand; plain float8 is.

    Raises:
        ValueError: With the tensor or the field that says so.
    """
    mark = _first(types, _QUANTISED) or next((field for field in metadata if "quant" in field.lower()), None)
    if mark is not None:
        raise ValueError(f"its weights are quantised, as {mark} says: serve them in bfloat16, float16 or float32")
    for name, dtype in types.items():
        if name.endswith((".weight", ".bias")) and _NO_NUMBERS_FOR_WEIGHTS.fullmatch(dtype):
            raise ValueError(f"its weights are quantised: {name} is of type {dtype}")


def _check_architecture(metadata: Mapping[str, str], pipeline_class: str) -> None:
    for field in _ARCHITECTURE_FIELDS:
        text = metadata.get(field, "").lower()
        pipeline = next((name for start, name in _ARCHITECTURES if re.match(start, text)), None)
        if pipeline is None:
            continue
        if _OTHER_TASKS.search(text):
            raise ValueError(f"its header says {field} = {metadata[field]!r}, which is no text-to-image model")
        if pipeline != pipeline_class and pipeline_class in {name for _, name in _ARCHITECTURES}:
            raise ValueError(f"its header says {field} = {metadata[field]!r}, which is not for a {pipeline_class}")
    if _is_true(metadata.get("ss_v2")) and pipeline_class != "StableDiffusionPipeline":
        raise ValueError(f"its header says ss_v2 = {metadata['ss_v2']!r} (SD 2.x), which is not for a {pipeline_class}")


def _predictions_of_header(metadata: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for field in _PREDICTION_FIELDS:
        if not metadata.get(field, "").strip():
            continue
        kind = _PREDICTIONS.get(re.sub(r"[^a-z]", "", metadata[field].lower()))
        if kind is None:
            raise ValueError(f"its header says {field} = {metadata[field]!r}, which is neither epsilon nor v")
        yield field, kind
    if _is_true(metadata.get("ss_v_parameterization")):  # "False" is what trainers write without knowing better
        yield "ss_v_parameterization", _VELOCITY
    for field in _ARCHITECTURE_FIELDS:
        if match := re.search(r"v2[-_](512|768[-_]v)", metadata.get(field, "").lower()):
            yield field, _NOISE if match[1] == "512" else _VELOCITY


def _is_true(value: str | None) -> bool:
    return value is not None and value.strip().lower() in ("true", "1", "yes")


def _first(names: Iterable[str], mark: re.Pattern[str]) -> str | None:
    return next((name for name in names if mark.search(name)), None)

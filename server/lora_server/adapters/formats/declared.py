"""What an adapter's files say in words of the model that they are for, held against the one that is served.

Obeyed where the words are known: `modelspec.architecture` (Stability's specification), `ss_base_model_version`
(sd-scripts and most trainers), and the base model of a PEFT configuration if it is a publisher's own repository. Words
that nobody here knows refuse nothing: names and shapes decide, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lora_server.adapters.formats.families import NAMES, family_of
from lora_server.adapters.formats.inputs import Model, SourceFile
from lora_server.errors import AdapterIncompatibleError

_WORDS: tuple[tuple[str, str, str], ...] = (
    ("flux2", "FLUX.2", r"flux2"),
    ("chroma", "Chroma", r"chroma"),
    ("flux", "FLUX.1", r"flux(1|dev|schnell|kontext|fill|krea|control|v1|$)"),
    ("sdxl-refiner", "SDXL refiner", r"(stablediffusionxl|sdxl)\w*refiner"),
    ("sdxl", "SDXL", r"stablediffusionxl|sdxl"),
    ("sd3", "SD3 / SD3.5", r"(stablediffusion|sd)v?3"),
    ("sd2", "SD 2.x", r"(stablediffusion|sd)v?2"),
    ("sd1", "SD 1.x", r"(stablediffusion|sd)v?1"),
    ("qwen-image", "Qwen-Image", r"qwenimage"),
    ("z-image", "Z-Image", r"zimage"),
    ("wan", "Wan", r"wan(2|v|i2v|t2v|$)"),
    ("hunyuan-image", "HunyuanImage", r"hunyuanimage"),
    ("hunyuan-video", "HunyuanVideo", r"hunyuanvideo|framepack"),
    ("hunyuan-dit", "HunyuanDiT", r"hunyuandit"),
    ("lumina", "Lumina", r"lumina"),
    ("hidream", "HiDream", r"hidream"),
    ("kolors", "Kolors", r"kolors"),
    ("auraflow", "AuraFlow", r"auraflow"),
    ("pixart", "PixArt", r"pixart"),
    ("sana", "Sana", r"sana"),
    ("ltx", "LTX-Video", r"ltx"),
    ("cogvideo", "CogVideoX", r"cogvideo"),
    ("cogview", "CogView", r"cogview"),
    ("cascade", "Stable Cascade", r"stablecascade"),
    ("kandinsky", "Kandinsky", r"kandinsky"),
    ("omnigen", "OmniGen", r"omnigen"),
)
"""Families, their names, and how words for them begin, in small letters and digits alone; the first that fits."""
_ARCHITECTURE_FIELDS = ("modelspec.architecture", "ss_base_model_version")
_PUBLISHERS = {
    "alpha-vllm", "black-forest-labs", "compvis", "efficient-large-model", "fal", "hidream-ai", "kwai-kolors",
    "lightricks", "lodestones", "pixart-alpha", "qwen", "runwayml", "stabilityai", "stable-diffusion-v1-5", "thudm",
    "tencent", "tongyi-mai", "wan-ai", "zai-org",
}  # fmt: skip
"""Whose repositories on the hub are named after the model in them; anybody else's may be named after anything."""
_MAX_SHOWN_CHARS = 100


def family_of_words(text: str) -> str | None:
    """Returns the family that *text* names, such as `flux-1-dev/lora`; None if the words are not known."""
    plain = re.sub(r"[^a-z0-9]", "", text.partition("/")[0].lower())
    return next((family for family, _, mark in _WORDS if re.match(mark, plain)), None)


def check_words(adapter: str, model: Model, files: Sequence[SourceFile]) -> list[str]:
    """Refuses files whose words are for another model than *model*; returns what could not be told, a sentence each.

    Raises:
        AdapterIncompatibleError: If so; it names both families.
    """
    served = _served(model)
    warnings: list[str] = []
    for where, said, family in (each for file in files if model.family for each in _declared(file)):
        if family is None:
            warnings.append(f"{where} is {said!r}, which is not known here: only names and shapes were compared")
        elif served is None:
            warnings.append(f"{where} is {said!r}; whether the served {model.family} is that cannot be told")
        elif family != served:
            families = _name(family), _name(served)
            raise AdapterIncompatibleError(adapter, model.name, f"it is {said!r}", where, families)
    return list(dict.fromkeys(warnings))


def check_tensors(adapter: str, model: Model, files: Sequence[SourceFile]) -> None:
    """Refuses files whose names and shapes are another family's, though some of them may fit.

    Raises:
        AdapterIncompatibleError: If so. Only among `families.NAMES`, which others share their layouts with.
    """
    served = _served(model)
    for file in files if served in NAMES else ():
        found = family_of({key: info.shape for key, info in file.tensors.tensors.items()})
        if found not in (None, served):
            key = next(iter(file.tensors.tensors))
            raise model.incompatible(adapter, file.tensors, "the file's names and shapes are that family's", key)


def _served(model: Model) -> str | None:
    return model.family if model.family in NAMES else family_of_words(model.family)


def _declared(file: SourceFile) -> Iterator[tuple[str, str, str | None]]:
    """Where a file names its model, with which words, and which family that is if the words are known."""
    for field in _ARCHITECTURE_FIELDS:
        said = file.tensors.metadata.get(field, "").strip()
        if said:
            yield field, said[:_MAX_SHOWN_CHARS], family_of_words(said)
    base = file.config.base_model if file.config is not None else ""
    owner, slash, name = base.partition("/")
    if slash and owner.lower() in _PUBLISHERS and (family := family_of_words(name)) is not None:
        yield "base_model_name_or_path", base[:_MAX_SHOWN_CHARS], family


def _name(family: str) -> str:
    return next(name for each, name, _ in _WORDS if each == family)

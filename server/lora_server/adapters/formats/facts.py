"""What an adapter's files say of themselves, beside the weights: base model, title, trigger words, a suggested scale.

Sources, the first that has something wins: `modelspec.*` (Stability's specification), the `ss_*` fields of sd-scripts,
a PEFT configuration, A1111's NAME.json beside the file, the front matter of a model card. Nothing here changes a
picture, so what cannot be read is passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_server.adapters.formats.inputs import SourceFile

_MAX_TRIGGER_WORDS = 16
_MAX_CHARS = 200
_FIELD = re.compile(r"(?P<name>[A-Za-z_][\w.-]*):\s*(?P<value>.*)")


@dataclass(frozen=True, slots=True)
class Facts:
    """See `types.LoadReport`."""

    base_model: str = ""
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    suggested_scale: float | None = None


def read_facts(files: Sequence[SourceFile], cards: Mapping[str, bytes]) -> Facts:
    """Collects what the files and their cards, by name, say."""
    metadata = {name: value for file in files for name, value in file.tensors.metadata.items()}
    sidecar = _json_object(next((data for name, data in cards.items() if name.endswith(".json")), b"{}"))
    card = _front_matter(next((data for name, data in cards.items() if name.endswith(".md")), b""))
    configured = [file.config.base_model for file in files if file.config is not None]
    return Facts(
        base_model=_first_text(
            metadata.get("modelspec.architecture"),
            metadata.get("ss_base_model_version"),
            *configured,
            metadata.get("ss_sd_model_name"),
            sidecar.get("sd version"),
            *card.get("base_model", ()),
        ),
        title=_first_text(metadata.get("modelspec.title"), metadata.get("ss_output_name"), metadata.get("name")),
        trigger_words=_trigger_words(metadata, sidecar, card),
        suggested_scale=_scale(sidecar.get("preferred weight"), *card.get("lora_scale", ())),
    )


def _trigger_words(
    metadata: Mapping[str, str], sidecar: Mapping[str, Any], card: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    for words in (
        [metadata.get("modelspec.trigger_phrase", "")],
        [sidecar.get("activation text", "")],
        card.get("instance_prompt", ()),
        card.get("trigger_words", ()),
        _frequent_tags(metadata.get("ss_tag_frequency", "")),
    ):
        found = tuple(dict.fromkeys(_clean(word) for word in words if isinstance(word, str) and _clean(word)))
        if found:
            return found[:_MAX_TRIGGER_WORDS]
    return ()


def _frequent_tags(text: str) -> list[str]:
    """The tags of `ss_tag_frequency`, {folder: {tag: count}}, that stand in at least half of a folder's captions.

    A trigger word is in nearly every caption of what was trained; what is rarer describes single pictures.
    """
    counts: dict[str, float] = {}
    for folder in _json_object(text.encode()).values():
        numbers = {tag: n for tag, n in folder.items() if isinstance(n, int)} if isinstance(folder, dict) else {}
        most = max(numbers.values(), default=0)
        for tag, count in numbers.items():
            if 2 * count >= most:
                counts[tag] = max(counts.get(tag, 0), count)
    return sorted(counts, key=lambda tag: (-counts[tag], tag))


def _front_matter(data: bytes) -> dict[str, tuple[str, ...]]:
    """The scalars and lists of scalars in a model card's front matter: the part of YAML that cards use."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text[4:].partition("\n---")[0].split("\n"):
        if match := _FIELD.fullmatch(line):
            current = fields[match["name"]] = _scalars(match["value"])
        elif line.lstrip().startswith("- "):
            current.append(_unquoted(line.lstrip()[2:]))
    return {name: tuple(values) for name, values in fields.items()}


def _scalars(text: str) -> list[str]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_unquoted(part) for part in text[1:-1].split(",")]
    return [_unquoted(text)] if text else []


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_text(*values: object) -> str:
    return next((_clean(value) for value in values if isinstance(value, str) and _clean(value)), "")


def _clean(text: str) -> str:
    """One printable line of bounded length."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() else " " for char in text).strip()[:_MAX_CHARS]


def _scale(*values: object) -> float | None:
    found: Iterable[float] = (number for value in values if (number := _number(value)) is not None)
    return next(iter(found), None)


def _number(value: object) -> float | None:
    """A scale that a request could name; A1111 writes 0 for none."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number and abs(number) <= 100 else None

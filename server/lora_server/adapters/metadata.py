"""What an adapter's own files say of it besides its weights: its trigger words.

The first place that names any counts: `lora_inference.json` beside the weights (`{"trigger_words": [...]}`), the
safetensors header (`modelspec.trigger_phrase`), A1111's NAME.json (`activation text`), the front matter of the model
card README.md (`trigger_words`, `trigger`, `instance_prompt`), and the tags that most captions of the training had
(`ss_tag_frequency` of sd-scripts). The first is written for this server and must be right; the others are other
people's, and what cannot be read there says nothing. None of it changes the weights, so none of it is part of the
digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from lora_server.adapters.source import CARD_FILE, SETTINGS_FILE
from lora_server.errors import AdapterMalformedError
from lora_server.use_settings import MAX_TRIGGER_CHARS, with_trigger_words

MAX_WORDS = 16

_CARD_FIELDS = ("trigger_words", "trigger", "instance_prompt")
_MAX_FRONT_MATTER_CHARS = 64 * 1024


def trigger_words(name: str, cards: Mapping[str, bytes], header: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the trigger words of the adapter *name*, each once.

    *cards* are the files beside the weights, by name; *header* is the weights' own metadata.

    Raises:
        AdapterMalformedError: If `lora_inference.json` is not what it should be.
    """
    if SETTINGS_FILE in cards:
        words = _from_settings(name, cards[SETTINGS_FILE])
        if words:
            return words
    return (
        _bounded(_words(header.get("modelspec.trigger_phrase")))
        or _bounded(_words(sidecar(cards).get("activation text")))
        or _bounded(_from_card(cards))
        or _bounded(_words(_frequent_tags(header.get("ss_tag_frequency", ""))))
    )


def sidecar(cards: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The fields of A1111's NAME.json; none if there is no such file, or none that can be read."""
    names = (name for name in cards if name.endswith(".json") and name != SETTINGS_FILE)
    return _json_object(cards.get(next(names, ""), b""))


def front_matter(cards: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The fields of the YAML between the first two lines `---` of the model card; none if it cannot be read."""
    text = cards.get(CARD_FILE, b"").decode("utf-8", "replace").replace("\r\n", "\n")
    front, found, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not found or len(front) > _MAX_FRONT_MATTER_CHARS:
        return {}
    try:
        fields = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _from_settings(name: str, data: bytes) -> tuple[str, ...]:
    try:
        content = json.loads(data)
        unknown = sorted(set(content) - {"trigger_words"}) if isinstance(content, dict) else ["not an object"]
    except (ValueError, RecursionError) as error:
        raise AdapterMalformedError(name, "is not JSON", SETTINGS_FILE) from error
    if unknown:
        raise AdapterMalformedError(name, f"has only the field trigger_words, not {unknown[0]!r}", SETTINGS_FILE)
    given = content.get("trigger_words", [])
    words = _words(given)
    if not isinstance(given, list) or len(words) < len(given) or _bounded(words) != words:
        detail = f"trigger_words must be a list of at most {MAX_WORDS} different printable texts, {MAX_TRIGGER_CHARS} "
        raise AdapterMalformedError(name, f"{detail}characters in all", SETTINGS_FILE)
    return words


def _from_card(cards: Mapping[str, bytes]) -> tuple[str, ...]:
    fields = front_matter(cards)
    return next((words for field in _CARD_FIELDS if (words := _words(fields.get(field)))), ())


def _frequent_tags(text: str) -> list[str]:
    """The tags of `ss_tag_frequency`, {folder: {tag: count}}, that stand in at least half of a folder's captions.

    A trigger word is in nearly every caption of what was trained; what is rarer describes single pictures.
    """
    counts: dict[str, float] = {}
    for folder in _json_object(text.encode("utf-8", "replace")).values():
        numbers = {tag: n for tag, n in folder.items() if isinstance(n, int)} if isinstance(folder, dict) else {}
        most = max(numbers.values(), default=0)
        for tag, count in numbers.items():
            if 2 * count >= most:
                counts[tag] = max(counts.get(tag, 0), count)
    return sorted(counts, key=lambda tag: (-counts[tag], tag))


def _json_object(data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _words(value: object) -> tuple[str, ...]:
    """A text, or those of a list, on one line each and without what cannot be printed; each once."""
    items: Iterable[object] = value if isinstance(value, list) else [value]
    cleaned = [" ".join(item.split()) for item in items if isinstance(item, str)]
    return tuple(dict.fromkeys(word for word in cleaned if word and word.isprintable()))


def _bounded(words: tuple[str, ...]) -> tuple[str, ...]:
    """The first words that keep within the bounds."""
    kept: list[str] = []
    for word in words[:MAX_WORDS]:
        if len(with_trigger_words("", [*kept, word])) > MAX_TRIGGER_CHARS:
            break
        kept.append(word)
    return tuple(kept)

"""What an adapter's own files say of it besides its weights: its trigger words.

Three places, the first that names any counts: `lora_inference.json` beside the weights (`{"trigger_words": [...]}`),
the safetensors header (`modelspec.trigger_phrase`), and the front matter of the model card README.md
(`trigger_words`, `trigger`, `instance_prompt`). The first is written for this server and must be right; the others
are other people's, and what cannot be read there says nothing. None of it changes the weights, so none of it is part
of the digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from lora_server.errors import AdapterMalformedError
from lora_server.use_settings import MAX_TRIGGER_CHARS, with_trigger_words

SETTINGS_FILE = "lora_inference.json"
MODEL_CARD = "README.md"
FILES = (SETTINGS_FILE, MODEL_CARD)
MAX_FILE_BYTES = 1024 * 1024
MAX_WORDS = 16

_CARD_FIELDS = ("trigger_words", "trigger", "instance_prompt")
_MAX_FRONT_MATTER_CHARS = 64 * 1024


def trigger_words(name: str, files: Mapping[str, bytes], weights: bytes) -> tuple[str, ...]:
    """Returns the trigger words of the adapter *name*, each once.

    *files* are those of `FILES` that there are, *weights* a safetensors file that has been checked already.

    Raises:
        AdapterMalformedError: If `lora_inference.json` is not what it should be.
    """
    if SETTINGS_FILE in files:
        words = _from_settings(name, files[SETTINGS_FILE])
        if words:
            return words
    phrase = _header_metadata(weights).get("modelspec.trigger_phrase")
    return _bounded(_words(phrase)) or _bounded(_from_card(files.get(MODEL_CARD, b"")))


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


def _header_metadata(weights: bytes) -> Mapping[str, Any]:
    try:
        length = int.from_bytes(weights[:8], "little")
        metadata = json.loads(weights[8 : 8 + length]).get("__metadata__")
    except (ValueError, RecursionError, AttributeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _from_card(data: bytes) -> tuple[str, ...]:
    """The words in the YAML between the first two lines `---`."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    front, found, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not found or len(front) > _MAX_FRONT_MATTER_CHARS:
        return ()
    try:
        fields = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ()
    if not isinstance(fields, dict):
        return ()
    return next((words for field in _CARD_FIELDS if (words := _words(fields.get(field)))), ())


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

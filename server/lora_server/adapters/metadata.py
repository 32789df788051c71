"""What an adapter's own files say of it besides its weights: its trigger words.

The first place that names any counts: `lora_inference.json` beside the weights (`{"trigger_words": [...]}`), the
safetensors header (`modelspec.trigger_phrase`), A1111's NAME.json (`activation text`), the front matter of the model
card README.md (`trigger_words`, `trigger`, `instance_prompt`), and the tags that most captions of the training had
(`ss_tag_frequency` of sd-scripts). The first is written for this server and must be right; the others are other
people's, and what cannot be read there says nothing. None of it changes the weights, so none of it is part of the
digest.

Each file is parsed once, one after the other, and only the fields that are asked for outlive it: hostile JSON takes
forty times its size and YAML four hundred times, and a load may take 16 MiB beside its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lora_server.adapters.source import CARD_FILE, SETTINGS_FILE
from lora_server.errors import AdapterMalformedError
from lora_server.use_settings import MAX_TRIGGER_CHARS, with_trigger_words

MAX_WORDS = 16

_CARD_FIELDS = ("trigger_words", "trigger", "instance_prompt")
_READ_OF_CARD = (*_CARD_FIELDS, "base_model", "lora_scale")
_READ_OF_SIDECAR = ("activation text", "sd version", "preferred weight")
_MAX_FRONT_MATTER_BYTES = 24 * 1024
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"
_PLACEHOLDER = re.compile(r"<s\d+>", re.IGNORECASE)
"""Tokens that diffusers' and cog's pivotal tuning adds."""
_IN_BRACKETS = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, slots=True)
class Cards:
    """What the files beside the weights say, as far as anybody asks.

    Attributes:
        words: Of `lora_inference.json`.
        sidecar: `activation text`, `sd version` and `preferred weight` of A1111's NAME.json.
        front: The fields of the model card that are read, each a text, a number, None or a list of those.
    """

    words: tuple[str, ...]
    sidecar: Mapping[str, Any]
    front: Mapping[str, Any]


def read_cards(name: str, cards: Mapping[str, bytes]) -> Cards:
    """Reads the files beside the weights of the adapter *name*, by name.

    Raises:
        AdapterMalformedError: If `lora_inference.json` is not what it should be.
    """
    words = _from_settings(name, cards[SETTINGS_FILE]) if SETTINGS_FILE in cards else ()
    return Cards(words, _sidecar(cards), _front_matter(cards.get(CARD_FILE, b"")))


def trigger_words(cards: Cards, header: Mapping[str, str], new_words: Collection[str] = ()) -> tuple[str, ...]:
    """Returns the trigger words, each once; *header* is the weights' own metadata.

    *new_words* are those of embeddings that belong to the adapter and are not applied. What has one of them in it, or
    a placeholder of pivotal tuning, means nothing to the text encoders, and is passed over.
    """
    sources: Iterable[Callable[[], tuple[str, ...]]] = (
        lambda: cards.words,
        lambda: _words(header.get("modelspec.trigger_phrase")),
        lambda: _words(cards.sidecar.get("activation text")),
        lambda: _from_card(cards.front),
        lambda: _words(_frequent_tags(header.get("ss_tag_frequency", ""))),
    )
    meant = (tuple(word for word in source() if not _needs_embedding(word, new_words)) for source in sources)
    return next((bounded for words in meant if (bounded := _bounded(words))), ())


def _needs_embedding(word: str, new_words: Collection[str]) -> bool:
    """Whether *word* has a placeholder in it; those in brackets and TOK are ordinary texts but beside embeddings."""
    if _PLACEHOLDER.search(word) is not None:
        return True
    return bool(new_words) and (
        _IN_BRACKETS.search(word) is not None or any(each in new_words for each in re.findall(r"[\w-]+", word))
    )


def _sidecar(cards: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The fields of A1111's NAME.json; none if there is no such file, or none that can be read."""
    names = (name for name in cards if name.endswith(".json") and name != SETTINGS_FILE)
    fields = _json_object(cards.get(next(names, ""), b""))
    return {field: fields[field] for field in _READ_OF_SIDECAR if isinstance(fields.get(field), (str, int, float))}


def _front_matter(card: bytes) -> Mapping[str, Any]:
    """The fields of the YAML between the first two lines `---` of the model card; none if it cannot be read."""
    text = card[: _MAX_FRONT_MATTER_BYTES + 16].decode("utf-8", "replace").replace("\r\n", "\n")
    front, found, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not found:
        return {}
    try:
        root = yaml.compose(front, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    # Not constructed: PyYAML's constructors fail in many ways on what a tag or a number may be, and merges multiply.
    return {key.value: _plain(value) for key, value in pairs if key.tag == _TEXT and key.value in _READ_OF_CARD}


def _plain(node: yaml.Node) -> object:
    """A text, a number, or a list of those; None for anything else."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value if isinstance(each, yaml.ScalarNode)]
    if node.tag in _NUMBERS:
        try:
            return float(node.value)
        except (TypeError, ValueError):  # other writings of YAML, or a tag on what is none
            return None
    return node.value if isinstance(node, yaml.ScalarNode) and node.tag == _TEXT else None


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


def _from_card(front: Mapping[str, Any]) -> tuple[str, ...]:
    return next((words for field in _CARD_FIELDS if (words := _words(front.get(field)))), ())


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

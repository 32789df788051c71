"""What an adapter's files say of themselves, beside the weights: base model, title, trigger words, a suggested scale.

Sources, the first that has something wins: `modelspec.*` (Stability's specification), the `ss_*` fields of sd-scripts,
a PEFT configuration, A1111's NAME.json beside the file, the front matter of a model card (`adapters.metadata` reads
those, and knows where trigger words may stand). Nothing here changes a picture, so what cannot be read is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_server.adapters import metadata
from lora_server.adapters.formats.inputs import SourceFile

_MAX_CHARS = 200


@dataclass(frozen=True, slots=True)
class Facts:
    """See `types.LoadReport`."""

    base_model: str = ""
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    suggested_scale: float | None = None


def read_facts(
    adapter: str, files: Sequence[SourceFile], cards: Mapping[str, bytes], new_words: Collection[str] = ()
) -> Facts:
    """Collects what the files and their cards, by name, say; *new_words* as of `metadata.trigger_words`.

    Raises:
        AdapterMalformedError: If the adapter has a `lora_inference.json` that is not what it should be.
    """
    header = {name: value for file in files for name, value in file.tensors.metadata.items()}
    said = metadata.read_cards(adapter, cards)
    sidecar, card = said.sidecar, said.front
    configured = [file.config.base_model for file in files if file.config is not None]
    return Facts(
        base_model=_first_text(
            header.get("modelspec.architecture"),
            header.get("ss_base_model_version"),
            *configured,
            header.get("ss_sd_model_name"),
            sidecar.get("sd version"),
            *_listed(card.get("base_model")),
        ),
        title=_first_text(header.get("modelspec.title"), header.get("ss_output_name"), header.get("name")),
        trigger_words=metadata.trigger_words(said, header, new_words),
        suggested_scale=_scale(sidecar.get("preferred weight"), *_listed(card.get("lora_scale"))),
    )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


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

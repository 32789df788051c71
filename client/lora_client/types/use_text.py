"""One adapter of a request as text, `NAME[@DIGEST][:SCALE][,SETTING...]`: read, or refused with what was read."""

from __future__ import annotations

import math
import os
import re
from typing import Any

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_SCALE = re.compile(_NUMBER)
_SETTING = rf"(?:trigger|[A-Za-z0-9_.*?-]+={_NUMBER})"
_WITH_SETTINGS = re.compile(rf"(.*?)((?:,{_SETTING})+)", re.DOTALL)
_DECIMAL_COMMA = re.compile(r"(.*?[:=][+-]?[0-9]+),([0-9]+)(?:,.*)?", re.DOTALL)
_SETTINGS = "COMPONENT=FACTOR, BLOCK.PATTERN=FACTOR, start=FRACTION, end=FRACTION and trigger"


def use_fields(text: str) -> dict[str, Any]:
    """Returns the fields of the `AdapterUse` that *text* describes; its `parse` says what may be written.

    Raises:
        ValueError: If it is none of these; says what was read, and what may have been meant.
    """
    with_settings = _WITH_SETTINGS.fullmatch(text)
    if with_settings is not None:
        return use_fields(with_settings[1]) | _settings(with_settings[2][1:].split(","))
    if text.startswith("hub://"):
        path, scale = _split_scale(text)
        return {"path": path, "scale": scale}
    if text.startswith(("/", "./", "../", "~")):
        path, scale = _split_scale(text)
        return {"path": os.path.abspath(os.path.expanduser(path)), "scale": scale}
    if text.startswith("sha256:"):
        digest, scale = _digest(text)
        return {"digest": digest, "scale": scale}
    name, at, rest = text.partition("@")
    if not at:
        name, scale = _split_scale(text)
        return {"name": _checked_name(name, text), "scale": scale}
    if not rest.startswith("sha256:"):
        raise ValueError(f"{rest!r} after @ is not a digest")
    digest, scale = _digest(rest)
    return {"name": _checked_name(name, text), "scale": scale, "expected_digest": digest}


def _split_scale(text: str) -> tuple[str, float | None]:
    head, colon, tail = text.rpartition(":")
    if colon and _SCALE.fullmatch(tail):
        return head, _finite(tail)
    return text, None


def _digest(text: str) -> tuple[str, float | None]:
    digest, scale = text[:71], None
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not 'sha256:' and 64 lower-case hex digits")
    if len(text) > 71:
        rest, scale = _split_scale("x" + text[71:])
        if rest != "x":
            raise ValueError(f"{text!r} is not a digest with a scale")
    return digest, scale


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond every number of an adapter; scales are from -100 to 100")
    return number


def _checked_name(name: str, text: str) -> str:
    """Returns *name*; refuses what no adapter can be called, with a guess at what *text* was meant to say."""
    if not name:
        raise ValueError("the name of the adapter is missing")
    if _NAME.fullmatch(name):
        return name
    comma = _DECIMAL_COMMA.fullmatch(text)
    if comma is not None:
        raise ValueError(f"{text!r} has a comma in a number; did you mean {comma[1]}.{comma[2]}?")
    if "," in name:
        raise ValueError(f"{name.partition(',')[2]!r} is no setting of an adapter; there are {_SETTINGS}")
    head, colon, tail = name.partition(":")
    if colon:
        tail = text.partition(":")[2]
        raise ValueError(f"{text!r} was read as the adapter {head!r} and its scale {tail!r}, which is not one number")
    raise ValueError(f"{name!r} is no name of an adapter{_guess(name, text)}")


def _guess(name: str, text: str) -> str:
    head, equals, tail = text.partition("=")
    if equals and _SCALE.fullmatch(tail):
        return f"; did you mean {head}:{tail}?"
    if "/" in name:
        return f"; did you mean the path ./{text}, or hub://{text}?"
    lower = name.strip().lower()
    if _NAME.fullmatch(lower):
        return f"; did you mean {lower}?"
    return ": names are 1 to 128 characters of a-z, 0-9, '.', '_' and '-', the first a letter or a digit"


def _settings(parts: list[str]) -> dict[str, Any]:
    """The fields that settings such as `text_encoder=0.5` stand for."""
    components: dict[str, float] = {}
    blocks: dict[str, float] = {}
    found: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        target = blocks if "." in key else components
        if key == "trigger" and not value:
            key, target = "use_trigger_words", found
        elif key in ("start", "end"):
            target = found
        key = key.removeprefix(".")
        if key in target:
            raise ValueError(f"{part!r} is there twice")
        target[key] = _finite(value) if value else True
    return {"component_scales": components, "block_scales": blocks, **found}

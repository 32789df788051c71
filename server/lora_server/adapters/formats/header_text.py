"""The JSON text of a safetensors header, member by member, so that a hostile one takes little more memory than itself.

Parsed as a whole, JSON takes up to forty times its bytes. Here one member is parsed at a time, and of what the file
says of itself only what is of a readable size is kept. Knows JSON, and nothing of what the members mean.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # there, but not in typeshed
from typing import Any

METADATA = "__metadata__"
MAX_VALUE_CHARS = 384 * 1024
"""Of one value of the metadata that is kept: parsed in its turn, hostile JSON takes forty times as much."""
_MAX_KEPT_BYTES = 1536 * 1024
"""Of all that are kept, in memory, where a character takes up to four."""
_MAX_FIELDS = 4096
_MAX_ENTRY_CHARS = 4096
_SPACE = re.compile(r"[ \t\n\r]*")
# The usual member, whose key needs no unescaping: `"KEY": {...}` and what follows.
_MEMBER = re.compile(
    r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*'
    rf"(\{{[^{{}}]{{0,{_MAX_ENTRY_CHARS}}}\}})[ \t\n\r]*([,}}])"
)


class MetadataError(ValueError):
    """What the file says of itself is not strings by strings, or is too much."""


class HeaderText:
    """One pass over a header; ValueError or RecursionError wherever it is not a JSON object of objects."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._text = str(data, "latin-1")  # a byte a character, whatever the text is
        self._at = 0
        self.metadata: dict[str, str] = {}
        """What the file says of itself; whole when `members` has ended."""
        self.oversized: set[str] = set()
        """Fields of the metadata whose values are too large to be kept."""

    def count(self, part: str) -> int:
        """How often *part* stands in the text."""
        return self._text.count(part)

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yields every member but the metadata, with its parsed value."""
        self._take("{")
        last = self._peek() == "}"
        if last:
            self._take("}")
        while not last:
            usual = _MEMBER.match(self._text, self._at)
            if usual and usual[1] != METADATA:
                self._at = usual.end()
                yield _utf8(usual[1]), _decode(_utf8(usual[2]))
                last = usual[3] == "}"
                continue
            key = self._string()
            self._take(":")
            if key == METADATA:
                self._read_metadata()
            else:
                yield key, _decode(self._entry())
            last = self._take(",}") == "}"
        self._peek()
        if self._at != len(self._text):
            raise ValueError("more text follows the object")

    def _read_metadata(self) -> None:
        if self.metadata or self.oversized or self._peek() != "{":
            raise MetadataError("that is not strings, once")
        self._take("{")
        kept = 0
        if self._peek() == "}":
            self._take("}")
            return
        while True:
            key = self._string()
            self._take(":")
            if self._peek() != '"':
                raise MetadataError("that is not strings")
            value = self._string(keep=True)
            if key in self.metadata or key in self.oversized:
                raise ValueError("a key is there twice")
            kept += sys.getsizeof(key) + sys.getsizeof(value)
            if value is None or kept > _MAX_KEPT_BYTES:
                self.oversized.add(key)
            else:
                self.metadata[key] = value
            if len(self.metadata) + len(self.oversized) > _MAX_FIELDS:
                raise MetadataError(f"of more than {_MAX_FIELDS} fields")
            if self._take(",}") == "}":
                return

    def _string(self, *, keep: bool = False) -> Any:
        """The string that begins here; with *keep*, None if it is too long to be kept."""
        self._take('"')
        began = self._at
        _, self._at = scanstring(self._text, began, True)
        if self._at - began > MAX_VALUE_CHARS:
            if keep:
                return None
            raise ValueError("a key is too long")
        return json.loads(_utf8(self._text[began - 1 : self._at]))

    def _entry(self) -> str:
        self._peek()
        end = self._text.find("}", self._at, self._at + _MAX_ENTRY_CHARS)
        if self._text[self._at : self._at + 1] != "{" or end < 0:
            raise ValueError("a tensor's entry is not an object of type, shape and place")
        began, self._at = self._at, end + 1
        return _utf8(self._text[began : end + 1])

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found or found not in expected:
            raise ValueError(f"{found!r} at byte {self._at}, not one of {expected!r}")
        self._at += 1
        return found

    def _peek(self) -> str:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._text[self._at : self._at + 1]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of *pairs*; ValueError if a key is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


_decode = json.JSONDecoder(object_pairs_hook=unique).decode  # `json.loads` would make a decoder for each member


def _utf8(text: str) -> str:
    return text if text.isascii() else text.encode("latin-1").decode("utf-8")

"""Names, ids and digests of adapters: their syntax, and how they are made from a path. Pure functions."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Container
from pathlib import PurePosixPath

MAX_ID = 2**63 - 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NAME_CHARS = 128
NAME_RULE = "must be 1 to 128 characters of a-z, 0-9, '.', '_' and '-', first a letter or digit"
_MAX_FILE_NAME_BYTES = 240
"""A little less than what file systems take, for what is put beside it."""
_NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")
_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What makes a name look as if it were another."""


def stable_adapter_id(path: str) -> int:
    """Returns the id that a path has on every server: `/adapters/a` is 7740576302019439696.

    SHA-256 of the UTF-8 bytes of the string exactly as given, first 8 bytes big-endian, AND 2^63-1; 0 becomes 1.

    Raises:
        ValueError: If the string has lone surrogates, which no UTF-8 has.
    """
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") & MAX_ID) or 1


def is_valid_name(name: str) -> bool:
    """Whether *name* may name an adapter."""
    return _NAME.fullmatch(name) is not None


def file_name_fault(name: str) -> str | None:
    """Says why a file of an adapter cannot be called *name* where others can write; None if it can.

    Blanks, brackets, quotes and the letters of every language are fine.
    """
    if not name or name.startswith("."):
        return "begins with a dot" if name else "has no characters"
    if "/" in name or "\\" in name:
        return "has a slash or backslash"
    if any(unicodedata.category(char) in _NOT_PRINTED or char in _BIDIRECTIONAL for char in name):
        return "has a character that cannot be printed"
    if len(name.encode()) > _MAX_FILE_NAME_BYTES:
        return f"has over {_MAX_FILE_NAME_BYTES} bytes in UTF-8"
    return None


def is_valid_digest(digest: str) -> bool:
    """Whether *digest* is `sha256:` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(digest) is not None


def name_for(path: str, adapter_id: int, taken: Container[str]) -> str:
    """Makes a free name from the last part of *path*; hex digits of the id tell equal ones apart."""
    if path.startswith("hub://"):
        path = (path.rpartition("@")[0] or path).removesuffix(".safetensors")
    slug = re.sub(r"[^a-z0-9._-]+", "-", PurePosixPath(path).name.lower()).strip("-._") or "adapter"
    slug = slug[:_MAX_NAME_CHARS]
    if slug not in taken:
        return slug
    digits = f"{adapter_id:016x}"
    for length in range(4, len(digits) + 1):
        name = f"{slug[: _MAX_NAME_CHARS - length - 1]}-{digits[:length]}"
        if name not in taken:
            return name
    raise AssertionError("another adapter has this path's name and id")

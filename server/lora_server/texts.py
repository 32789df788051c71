"""Texts of strangers, made fit to be shown and sent."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns *text* with what cannot be printed, or is no character at all, as an escape such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)

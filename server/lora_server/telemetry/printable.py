"""Text of others, such as names and messages of files, made harmless for a terminal."""

from __future__ import annotations


def printable(text: str, *, keep: str = "") -> str:
    r"""Returns *text* with everything that is no visible character or blank as an escape, such as ``\x1b``.

    Controls, line breaks, marks of text direction and lone surrogates are no visible characters; those in *keep* stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )

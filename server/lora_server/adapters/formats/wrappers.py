"""What training frameworks put around a module, and so into its name: no part of the name that a model has.

`torch.compile` (`_orig_mod`), FSDP, activation checkpointing and data parallelism wrap a model or any module inside it,
so these words may stand anywhere in a name, and more than once.
"""

from __future__ import annotations

import re

_WORDS = "orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module"
_DOTTED = re.compile(rf"(?:(?<=\.)|^)(?:_(?:{_WORDS})|module)\.")
# Kohya's spelling has `_` for the dots; `module` alone may be part of a word there (`names` takes it at the front).
_UNDERSCORED = re.compile(rf"(^|_)(?:_?(?:{_WORDS})_)+")
# In a pattern a dot may be escaped, and one that is repeated (`.*`) is none.
_DOT = r"(?:\\\.|\.(?![*+?{]))"
_IN_PATTERN = re.compile(
    rf"\\?\._(?:{_WORDS})$|(?<![A-Za-z0-9_])_(?:{_WORDS}){_DOT}?|(?:(?<=\.)|(?<![^^(|]))module{_DOT}"
)


def without_wrappers(name: str) -> str:
    """Returns a dotted name, or a tensor's key, without the wrappers in it."""
    return _DOTTED.sub("", name) if "mod" in name else name


def without_wrappers_underscored(name: str) -> str:
    """The same of a name in Kohya's spelling."""
    return _UNDERSCORED.sub(r"\1", name) if "_mod" in name else name


def without_wrappers_in_pattern(pattern: str) -> str:
    """The same of a regular expression that matches dotted names."""
    return _IN_PATTERN.sub("", pattern) if "mod" in pattern else pattern

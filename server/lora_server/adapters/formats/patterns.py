"""Regular expressions that a stranger wrote: matched as peft matches them, within bounds of time, length and memory.

Python's `re`, which peft uses, cannot be interrupted; `regex` can, but knows more (recursion, fuzzy matching), some of
which eats memory without end. So a pattern must be one of `re`, and is matched by `regex`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import regex

_MAX_PATTERN_CHARS = 2_000
_MAX_CLASSES = 32
"""Character classes in a pattern: `re` takes up to 15 ms to compile one, which nothing can interrupt."""
_MAX_TOTAL_S = 0.5
"""CPU seconds of the calling thread for all patterns of one file together; a legitimate file takes milliseconds."""


class PatternError(ValueError):
    """A pattern that cannot be used; the message says why, to follow the name of its field."""


@dataclass(slots=True)
class Matcher:
    """Matches the patterns of one file; for one thread."""

    _left_s: float = _MAX_TOTAL_S
    _compiled: dict[str, Any] = field(default_factory=dict)

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether *pattern* matches all of *text*.

        Raises:
            PatternError: If it is no pattern of Python's `re`, is too long, or the file's time is used up.
        """
        began_s = time.thread_time()
        try:
            return self._pattern(pattern).fullmatch(text, timeout=max(self._left_s, 1e-3)) is not None
        except TimeoutError as error:
            raise PatternError("is a regular expression that takes too long") from error
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            if isinstance(error, PatternError):
                raise
            raise PatternError(f"is not a regular expression ({error})") from error
        finally:
            self._left_s -= time.thread_time() - began_s

    def _pattern(self, pattern: str) -> Any:
        if self._left_s <= 0:
            raise PatternError("has regular expressions that take too long together")
        compiled = self._compiled.get(pattern)
        if compiled is None:
            if len(pattern) > _MAX_PATTERN_CHARS:
                raise PatternError(f"is a regular expression of more than {_MAX_PATTERN_CHARS} characters")
            if pattern.count("[") > _MAX_CLASSES:
                raise PatternError(f"is a regular expression of more than {_MAX_CLASSES} character classes")
            re.compile(pattern)
            compiled = self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
        return compiled


def names_end_of(names: frozenset[str] | set[str], path: str) -> bool:
    """Whether one of *names* is *path*, or its end at a dot; costs a look a part, however many names there are."""
    while path not in names:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True

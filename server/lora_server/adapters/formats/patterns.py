"""Regular expressions that a stranger wrote: matched as peft matches them, within bounds of time, length and memory.

Python's `re`, which peft uses, cannot be interrupted; `regex` can, but knows more (recursion, fuzzy matching), some of
which eats memory without end. So a pattern must be one of `re`, and is matched by `regex`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

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


V = TypeVar("V")
_PLAIN_NAME = re.compile(r"[\w.-]+")


class PatternValues(Generic[V]):
    """Values by pattern, of which the first that is a name's end, at a dot, counts: peft's `get_pattern_key`.

    What is a plain name costs a look a part of the name that is asked for, however many there are.
    """

    def __init__(self, values: Mapping[str, V]) -> None:
        self._values = tuple(values.items())
        self._plain = {pattern: n for n, pattern in enumerate(values) if _PLAIN_NAME.fullmatch(pattern)}
        self._others = [(n, pattern) for n, pattern in enumerate(values) if pattern not in self._plain]
        self._met: set[int] = set()

    def find(self, names: Sequence[str], default: V, matcher: Matcher) -> V:
        """Returns the value for the first of *names* that any pattern matches; PatternError as of `Matcher`."""
        for name in names if self._values else ():
            found = self._first(name, matcher)
            if found is not None:
                return self._values[found][1]
        return default

    def unmet(self, modules: Iterable[Sequence[str]], matcher: Matcher) -> list[str]:
        """Returns the patterns that match none of *modules*, each a module's names."""
        for names in modules if self.has_unmet else ():
            self._met |= {self._plain[end] for name in names for end in _ends(name) if end in self._plain}
            self._met |= {
                n for n, p in self._others if n not in self._met and any(_ends_with(matcher, p, x) for x in names)
            }
        return [pattern for n, (pattern, _) in enumerate(self._values) if n not in self._met]

    @property
    def has_unmet(self) -> bool:
        """Whether there are patterns that were no module's when they were asked for."""
        return len(self._met) < len(self._values)

    def _first(self, name: str, matcher: Matcher) -> int | None:
        plain = min((self._plain[end] for end in _ends(name) if end in self._plain), default=len(self._values))
        first = next((n for n, pattern in self._others if n < plain and _ends_with(matcher, pattern, name)), plain)
        if first == len(self._values):
            return None
        self._met.add(first)
        return first


def _ends_with(matcher: Matcher, pattern: str, name: str) -> bool:
    return matcher.fullmatch(rf"(.*\.)?({pattern})", name)


def _ends(name: str) -> Iterator[str]:
    """*name*, and its ends at a dot."""
    yield name
    while name := name.partition(".")[2]:
        yield name


def names_end_of(names: frozenset[str], path: str) -> bool:
    """Whether one of *names* is *path*, or its end at a dot; costs a look a part, however many names there are."""
    while path not in names:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True

"""What both command lines print, and how they end: lines that cannot drive a terminal, and errors of one line."""

from __future__ import annotations

import errno
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

DEBUG_ENV = "LORA_DEBUG"
INTERRUPTED = 130
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
"""Categories that a terminal obeys or does not show: controls, directions, zero width, surrogates, line breaks."""


def printable(text: str) -> str:
    """Returns *text* with each character that a terminal would obey or hide as its escape, such as `\\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(each) if unicodedata.category(each) in _HIDDEN else each for each in text)


def print_line(text: str) -> None:
    """Prints one line to standard output; line breaks in *text* are escaped like everything a terminal obeys.

    Raises:
        OSError: If it cannot be written.
    """
    _write(printable(text))


def print_json(value: object) -> None:
    """Prints *value* as JSON in ASCII, controls escaped; OSError as `print_line`."""
    _write(json_text(value, indent=2))


def json_text(value: object, *, indent: int | None = None) -> str:
    """Returns *value* as JSON in ASCII, without a character that a terminal obeys."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")


def flush() -> None:
    """Hands on what was printed, for whoever reads it while the command runs; OSError as `print_line`."""
    sys.stdout.flush()


def discard_output() -> None:
    """Lets standard output go nowhere from now on, what is left in its buffer included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def tell(text: str) -> None:
    """Writes one line to standard error; what cannot be written is dropped, for it is never worth the work."""
    try:
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def can_print(text: str) -> bool:
    """Whether *text* can be printed as it is: nothing is escaped, and the encoding of standard output has all of it."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return printable(text) == text


def run_command(command: Callable[[], int | None], on_error: Callable[[Exception], int]) -> int:
    """Runs *command* and returns the process's exit code; no error leaves it as a traceback.

    *on_error* tells an error and returns its exit code; what it raises again is unexpected, and one line too, or with
    LORA_DEBUG in the environment a traceback. Standard streams replace what their encoding does not have, from now on.
    """
    _prepare_streams()
    try:
        code = _guarded(command, on_error)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        code = _unwritten(error)
    return code


def usage_error(error: Exception) -> str | None:
    """Returns the text of an error that typer raises for wrong usage, or None if *error* is none."""
    text = getattr(error, "format_message", None)
    return str(text()) if text is not None else None


def tell_usage(error: Exception, text: str) -> None:
    """Tells a usage error; where it is the help of a command that was called without arguments, with its lines."""
    is_help = type(error).__name__ == "NoArgsIsHelpError"
    for line in text.splitlines() if is_help else [f"error: {text}"]:
        tell(line)


def os_error_text(error: OSError) -> str:
    """Returns what the operating system refused, and where, without its number."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename!r}: {error.strerror}" if error.filename is not None else error.strerror


def _write(line: str) -> None:
    try:
        sys.stdout.write(line + "\n")
    except OSError as error:
        raise _OutputError(error.errno, error.strerror) from error


class _OutputError(OSError):
    """Standard output cannot be written."""


def _guarded(command: Callable[[], int | None], on_error: Callable[[Exception], int]) -> int:
    try:
        return command() or 0
    except (BrokenPipeError, _OutputError):
        raise
    except Exception as error:
        if os.environ.get(DEBUG_ENV):
            raise
        try:
            return on_error(error)
        except Exception as unexpected:
            tell(f"error: {type(unexpected).__name__}: {unexpected} (unexpected; {DEBUG_ENV}=1 shows the traceback)")
            return 1


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        stream: Any = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # not what a host program has put there
            stream.reconfigure(errors="replace")


def _unwritten(error: OSError) -> int:
    """The end of a command whose output nobody takes; what is left of it must not be written at exit."""
    if error.errno != errno.EPIPE:
        tell(f"error: standard output: {error.strerror}")
    discard_output()
    return 1


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

"""Messages of the contract from values of callers, each checked against the field that it is for."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
_MAX_FLOAT = 3.4028234663852886e38
MAX_SECONDS = 315_576_000_000
"""The longest duration of protobuf: ten thousand years."""
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: 2**31 - 1,
    FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
    FieldDescriptor.CPPTYPE_INT64: 2**63 - 1,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
}
"""The largest value by type; no field of the contract is negative, ids and seeds included."""
_RANGES = {
    "scale": (-100, 100),
    "default_scale": (-100, 100),
    "guidance_scale": (0, 100),
    "start": (0, 1),
    "end": (0, 1),
    "stop": (0, 1),
}
"""The contract's ranges, to be named where a number is beyond all of them; the server checks the rest."""


def message(kind: type[M], /, **fields: object) -> M:
    """Makes a message of *fields*; None leaves one out.

    protobuf by itself takes bytes for text, booleans for numbers and text for a list of its letters, makes infinity of
    what is no float32, and names no field where it refuses.

    Raises:
        TypeError, ValueError: If a value is not of its field's type or range; names the field and what it takes.
    """
    known = kind.DESCRIPTOR.fields_by_name
    given = {name: _value(known[name], name, value) for name, value in fields.items() if value is not None}
    return kind(**given)


def seconds(field: str, value: object) -> float:
    """Returns *value* as a time that protobuf and gRPC can hold.

    Raises:
        TypeError, ValueError: If it is no number from 0 to ten thousand years; names *field*.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field}: {_shown(value)} is not a number of seconds")
    if not 0 <= value <= MAX_SECONDS:  # type: ignore[operator] # also for NaN
        raise ValueError(f"{field}: {_repr(value)} is not from 0 to {MAX_SECONDS} seconds")
    return float(value)


def real(field: str, value: object) -> float:
    """Returns *value* as a float, also one of numpy; TypeError or ValueError if it is no finite float32."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field}: {_shown(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _MAX_FLOAT:
        low, high = _RANGES.get(re.split(r"\W+", field.rstrip("]'"))[-1], ("-3.4e38", "3.4e38"))
        raise ValueError(f"{field}: {number} is not a finite number from {low} to {high}")
    return number


def texts(field: str, values: object) -> list[str]:
    """Returns *values*, a collection of texts; one text alone is refused, for it would be taken letter by letter."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{field}: {_shown(values)} is not a list of texts")
    return [text(field, value) for value in values]


def _value(descriptor: Any, field: str, value: object) -> object:
    if descriptor.cpp_type in (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_ENUM):
        return value
    if not descriptor.is_repeated:
        return _scalar(descriptor, field, value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{field}: {_shown(value)} is not a list")
    return [_scalar(descriptor, f"{field}[{k}]", each) for k, each in enumerate(value)]


def _scalar(descriptor: Any, field: str, value: object) -> object:
    if descriptor.cpp_type in _INTEGERS:
        return whole(field, value, _INTEGERS[descriptor.cpp_type])
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        return real(field, value)
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise TypeError(f"{field}: {_shown(value)} is not True or False")
        return value
    return text(field, value)


def whole(field: str, value: object, most: int) -> int:
    """Returns *value* as an int, also one of numpy; TypeError or ValueError if it is none from 0 to *most*."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field}: {_shown(value)} is not a whole number")
    if not 0 <= int(value) <= most:
        raise ValueError(f"{field}: {_repr(value)} is not from 0 to {most}")
    return int(value)


def text(field: str, value: object) -> str:
    """Returns *value*; TypeError or ValueError if it is no Unicode text."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: {_shown(value)} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: has {value[error.start]!r} at {error.start}, which is not Unicode text") from None
    return value


def _shown(value: object) -> str:
    return f"{_repr(value)} ({type(value).__name__})"


def _repr(value: object) -> str:
    """The value, briefly; a number of thousands of digits has no text at all."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."

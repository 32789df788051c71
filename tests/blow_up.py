"""Requests as large as they may be, of every kind: each field of a message, at any depth, blown up on the wire."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, LENGTH, GROUP, END_GROUP = 0, 2, 3, 4
UNKNOWN = 1000
MAX_DEPTH = 4


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def tag(number: int, kind: int) -> bytes:
    """What stands before a field."""
    return varint(number << 3 | kind)


def within(number: int, content: bytes) -> bytes:
    """A field with *content*."""
    return tag(number, LENGTH) + varint(len(content)) + content


def blown_up(message: Descriptor, size: int, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields each field's path, and a message of about *size* bytes that is nothing but that field."""
    for field in message.fields:
        yield from ((f"{field.name}{path}", content) for path, content in _of_field(field, size, depth))
    if depth == 0:
        yield "unknown numbers", (tag(UNKNOWN, VARINT) + b"\1") * (size // 3)
        yield "an unknown text", within(UNKNOWN, b"x" * size)
        yield "nested groups", tag(UNKNOWN, GROUP) * (size // 4) + tag(UNKNOWN, END_GROUP) * (size // 4)


def _of_field(field: FieldDescriptor, size: int, depth: int) -> Iterator[tuple[str, bytes]]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        empty = within(field.number, b"")
        yield " x many", empty * (size // len(empty))
        if depth < MAX_DEPTH:
            inside = blown_up(field.message_type, size, depth + 1)
            yield from ((f".{path}", within(field.number, content)) for path, content in inside)
    elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        for letter in ("x", ".", "/", "中", "\0"):
            text = letter.encode()
            yield f" of {letter!r}", within(field.number, text * (size // len(text)))
        yield " x many", within(field.number, b"") * (size // 2)
    elif field.is_repeated:
        yield " x many", within(field.number, b"\0" * size)
        yield " of ones", within(field.number, b"\1" * size)
    else:
        yield " again and again", (tag(field.number, VARINT) + b"\1") * (size // 2)

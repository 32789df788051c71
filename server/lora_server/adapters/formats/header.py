"""The header of a safetensors file: which tensors there are, where their bytes lie, and what the file says of itself.

Read before anything else and without torch, so that a report costs milliseconds and limits are checked before a tensor
is touched. Trusts nothing: every offset is checked against the file.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_server.adapters.formats import dialects
from lora_server.adapters.formats.header_text import MAX_VALUE_CHARS, HeaderText, MetadataError
from lora_server.errors import AdapterHeaderTooLargeError, AdapterMalformedError, AdapterTooManyTensorsError

_MAX_KEY_CHARS = 512
_BYTES_OF = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_SCALAR_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


Buffer = bytes | bytearray | mmap.mmap
"""A file's bytes."""

ReadBytes = Callable[[int, int], bytes | memoryview]
"""Returns the bytes of a file between two offsets."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its type as the file names it, its shape, and where its bytes lie after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one file may have; see `config.LimitsConfig`."""

    header_bytes: int = 8 * 1024 * 1024
    tensors: int = 32_768


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file of which only the header has been read.

    Attributes:
        name: Its path, for messages.
        tensors: By key, in the file's order.
        metadata: What the file says of itself; strings by string.
        size_bytes: Of the whole file.
        read: Returns the bytes from an offset after the header to another.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size_bytes: int
    read: ReadBytes = field(repr=False)

    def scalar(self, key: str) -> float:
        """Returns a tensor of one element as a number; ValueError if it is none."""
        info = self.tensors[key]
        data = bytes(self.read(info.start, info.stop))
        if math.prod(info.shape) != 1:
            raise ValueError(f"has shape {info.shape}, not one number")
        if info.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + data)[0])
        if info.dtype not in _SCALAR_FORMATS:
            raise ValueError(f"has type {info.dtype}, not a number's")
        return float(struct.unpack(_SCALAR_FORMATS[info.dtype], data)[0])


def read_header(adapter: str, name: str, size_bytes: int, read: ReadBytes, limits: Limits) -> TensorFile:
    """Reads the header of file *name* of *adapter*; *read* returns the bytes of the file between two offsets.

    Raises:
        AdapterMalformedError: If it is not a safetensors file, or lies about its bytes.
        AdapterHeaderTooLargeError, AdapterTooManyTensorsError: If a limit is exceeded.
    """
    if size_bytes < 8:
        raise AdapterMalformedError(adapter, "is cut short", name)
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > limits.header_bytes and length <= size_bytes - 8:
        raise AdapterHeaderTooLargeError(adapter, length, limits.header_bytes)
    if length > size_bytes - 8:
        raise AdapterMalformedError(adapter, "is cut short, or is not a safetensors file", name)
    text = HeaderText(read(8, 8 + length))
    entries = text.count('"data_offsets"')
    if entries > limits.tensors:  # before anything is made of them
        raise AdapterTooManyTensorsError(adapter, entries, limits.tensors)
    data_bytes = size_bytes - 8 - length
    tensors, metadata = _members(adapter, name, text, data_bytes)
    if not tensors:
        raise AdapterMalformedError(adapter, "has no tensors", name)
    _check_layout(adapter, name, tensors, data_bytes)
    return TensorFile(name, tensors, metadata, size_bytes, _after(8 + length, read))


def header_of_bytes(adapter: str, name: str, data: Buffer, limits: Limits) -> TensorFile:
    """Reads the header of a file that is in memory, or mapped into it."""
    return read_header(adapter, name, memoryview(data).nbytes, _reader(data), limits)


def over_bytes(file: TensorFile, data: Buffer) -> TensorFile:
    """Returns *file* with the tensors of *data*, whose header is the same; of no bytes, it can be read no more."""
    data_bytes = max((info.stop for info in file.tensors.values()), default=0)
    return replace(file, read=_after(file.size_bytes - data_bytes, _reader(data)))


def _reader(data: Buffer) -> ReadBytes:
    view = memoryview(data)
    return lambda start, stop: view[start:stop]


def _after(offset: int, read: ReadBytes) -> ReadBytes:
    return lambda start, stop: read(offset + start, offset + stop)


def _members(
    adapter: str, name: str, text: HeaderText, data_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a header."""
    tensors: dict[str, TensorInfo] = {}
    try:
        for key, entry in text.members():
            if key in tensors:
                raise ValueError("a key is there twice")
            tensors[key] = _tensor(adapter, key, entry, data_bytes)
    except MetadataError as error:
        raise AdapterMalformedError(adapter, f"has metadata {error}", name) from error
    except (ValueError, RecursionError) as error:
        raise AdapterMalformedError(adapter, f"has a header that is not a JSON object ({error})", name) from error
    key = dialects.DIFFUSERS_CONFIGS
    if key in text.oversized:  # the weights' meaning depends on it; without any other field the file can be read
        raise AdapterMalformedError(adapter, f"has more than {MAX_VALUE_CHARS} characters of metadata at {key}", name)
    return tensors, text.metadata


def _tensor(adapter: str, key: str, entry: Any, data_bytes: int) -> TensorInfo:
    if len(key) > _MAX_KEY_CHARS:
        raise AdapterMalformedError(adapter, f"has a name of more than {_MAX_KEY_CHARS} characters", key[:64])
    if not key.isascii() and not _is_text(key):
        raise AdapterMalformedError(adapter, "has a name that is no Unicode text", ascii(key[:64]))
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise TypeError
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterMalformedError(adapter, "has no type, shape and place", key) from error
    if not isinstance(dtype, str) or dtype not in _BYTES_OF:
        raise AdapterMalformedError(adapter, f"has the unknown type {repr(dtype)[:64]}", key)
    if start > stop or stop > data_bytes or stop - start != math.prod(shape) * _BYTES_OF[dtype]:
        raise AdapterMalformedError(adapter, "has a place in the file that does not fit its shape", key)
    return TensorInfo(sys.intern(dtype), shape, start, stop)


def _is_text(key: str) -> bool:
    """Whether it is; JSON can name halves of a surrogate pair, which nobody can encode."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_layout(adapter: str, name: str, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must fill the file without gaps and overlaps, as the format demands."""
    end = 0
    for info in sorted(tensors.values(), key=lambda each: (each.start, each.stop)):
        if info.start != end:
            raise AdapterMalformedError(adapter, "has tensors that overlap or leave gaps", name)
        end = info.stop
    if end != data_bytes:
        raise AdapterMalformedError(adapter, "is cut short, or has bytes of no tensor", name)

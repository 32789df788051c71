"""Finds numbers that are not finite without torch, by the bits of their exponents."""

from __future__ import annotations

from lora_server.adapters.formats.header import TensorFile, TensorInfo
from lora_server.adapters.formats.keys import Role
from lora_server.adapters.formats.layout import Layout
from lora_server.errors import AdapterMalformedError

NOT_FINITE = "has values that are not finite"
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # has no infinity, and one NaN
}
_CHUNK_BYTES = 8 * 1024 * 1024


def check_values(adapter: str, layout: Layout) -> None:
    """Reads every tensor of *layout*; a second for 400 MB.

    Raises:
        AdapterMalformedError: If one has values that are not finite; it names the first, as a load does.
    """
    for module in layout.plan.modules:
        file = layout.files[module.file]
        for role, key in module.keys.items():
            if role is not Role.ALPHA and not _is_finite(file.tensors, file.tensors.tensors[key]):
                prefix = file.config.prefix if file.config is not None else ""
                raise AdapterMalformedError(adapter, NOT_FINITE, prefix + key)


def _is_finite(file: TensorFile, info: TensorInfo) -> bool:
    import numpy as np  # takes a tenth of a second, which only who asks for the values should wait for

    kind, exponent = _EXPONENTS[info.dtype]
    for start in range(info.start, info.stop, _CHUNK_BYTES):
        bits = np.frombuffer(file.read(start, min(start + _CHUNK_BYTES, info.stop)), kind)
        if ((bits & np.array(exponent, bits.dtype)) == exponent).any():
            return False
    return True

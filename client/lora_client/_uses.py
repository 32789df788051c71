"""Adapters of a request in every form that callers may give them, to `AdapterUse`; what is no such form is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_client._fields import real
from lora_client.types import AdapterLike, AdaptersLike, AdapterUse

_ALIASES = {
    "lora_name": "name",
    "adapter_name": "name",
    "lora_path": "path",
    "lora_int_id": "id",
    "weight": "scale",
    "lora_scale": "scale",
}
"""Keys of other APIs' dictionaries (vLLM, fal, diffusers), and the fields of ours that mean the same."""
_KEYS = {field.name: field.name for field in dataclasses.fields(AdapterUse)} | _ALIASES
_SELECTORS = ("name", "id", "digest", "path")
_TAKEN = (
    "adapters are names, (name, scale) pairs, {name: scale} mappings, dictionaries such as "
    "{'path': ..., 'scale': ...}, AdapterUse objects, or lists of these"
)


def parse_uses(adapters: AdaptersLike) -> list[AdapterUse]:
    """Returns the uses that *adapters* means, in their order; an iterator is consumed.

    Raises:
        TypeError: If it is none of the forms of `AdaptersLike`, or a scale is no number; says what was given.
        ValueError: If a text is not understood, a scale is not finite, or is given twice.
    """
    if isinstance(adapters, (str, AdapterUse, Mapping)) or (isinstance(adapters, tuple) and _is_pair(adapters)):
        return _element("adapters", adapters)
    if isinstance(adapters, (bytes, bytearray, memoryview)) or not isinstance(adapters, (Sequence, Iterator)):
        raise _refused("adapters", adapters)
    return [use for k, each in enumerate(adapters) for use in _element(f"adapters[{k}]", each)]


def _element(where: str, given: AdapterLike) -> list[AdapterUse]:
    """One use, or those of a mapping."""
    if isinstance(given, str):
        return [AdapterUse.parse(given)]
    if isinstance(given, AdapterUse):
        return [given]
    if isinstance(given, Mapping):
        if any(isinstance(key, str) and key in _KEYS for key in given):
            return [_from_fields(where, given)]
        return [_scaled(where, key, scale) for key, scale in given.items()]
    if _is_pair(given):
        return [_scaled(where, *given)]
    raise _refused(where, given)


def _is_pair(given: object) -> bool:
    """Whether it is a name and something that can only be meant as its scale."""
    return (
        isinstance(given, (tuple, list))
        and len(given) == 2
        and isinstance(given[0], (str, AdapterUse))
        and not isinstance(given[1], (str, AdapterUse, Mapping, Sequence))
    )


def _scaled(where: str, name: object, scale: object) -> AdapterUse:
    if not isinstance(name, (str, AdapterUse)):
        raise _refused(where, name)
    use = AdapterUse.parse(name) if isinstance(name, str) else name
    number = real(f"{where}: scale of {name!r}", scale)
    if use.scale is not None:
        raise ValueError(f"{where}: the scale of {name!r} is given twice, the second time as {number:g}")
    return dataclasses.replace(use, scale=number)


def _from_fields(where: str, given: Mapping[Any, Any]) -> AdapterUse:
    """The use that a dictionary of fields describes; its keys are those of `AdapterUse`, or of other APIs."""
    fields: dict[str, Any] = {}
    for key, value in given.items():
        field = _KEYS.get(key) if isinstance(key, str) else None
        if field is None:
            raise TypeError(f"{where}: {key!r} is no key of an adapter's dictionary; there are {', '.join(_KEYS)}")
        if field in fields:
            raise TypeError(f"{where}: {key!r} gives the {field} a second time")
        fields[field] = real(f"{where}: {key}", value) if field == "scale" else value
    if not (named := [key for key in given if _KEYS[key] in _SELECTORS]):
        raise TypeError(f"{where}: {dict(given)!r} names no adapter; give 'name', 'path', 'id' or 'digest'")
    if len(named) > 1:
        raise TypeError(f"{where}: {named[0]!r} and {named[1]!r} name the adapter twice; give one of them")
    return AdapterUse(**fields)


def _refused(where: str, given: object) -> TypeError:
    text = repr(given)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return TypeError(f"{where}: {shown} ({type(given).__name__}) is no adapter; {_TAKEN}")

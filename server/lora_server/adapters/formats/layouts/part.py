"""How a module of another layout falls into modules of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Rows = tuple[tuple[int, int], ...]
"""Ranges of output rows, (start, stop), to be taken in this order."""


class ModuleShape(NamedTuple):
    """What adapters see of a module; a convolution is a linear over the patches under its kernel."""

    out_features: int
    in_features: int
    kernel: tuple[int, int] = (1, 1)


Shapes = Mapping[str, ModuleShape]
"""By path, every module that adapters may change."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of our modules as rows of another layout's module.

    Attributes:
        path: Our module.
        rows: Which rows of the other's output are its own; None for all, in order.
    """

    path: str
    rows: Rows | None = None


Layout = Mapping[str, tuple[Part, ...]]
"""The modules of another layout, by their names there."""


def fused(shapes: Shapes, paths: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts of a module that is several of ours, one under another; empty if one of them is missing."""
    if not all(path in shapes for path in paths):
        return ()
    parts, start = [], 0
    for path in paths:
        stop = start + shapes[path].out_features
        parts.append(Part(path, ((start, stop),)))
        start = stop
    return tuple(parts)


def swapped(shapes: Shapes, path: str) -> tuple[Part, ...]:
    """The part of a modulation whose halves, shift and scale, come in the other order with us."""
    if path not in shapes:
        return ()
    rows = shapes[path].out_features
    return (Part(path, ((rows // 2, rows), (0, rows // 2))),)

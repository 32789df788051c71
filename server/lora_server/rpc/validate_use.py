"""Faults of where and when an adapter is to act; pure functions of the message, the model and the number of steps.

What only the adapter's files can say (which modules it changes, whether it has trigger words) is checked when the use
is resolved, in `adapters.uses`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lora_api.v1 import adapter_pb2

from lora_server.errors import FieldFault
from lora_server.rpc import convert
from lora_server.types import ModelInfo

MAX_FACTOR = 100.0
MAX_BLOCK_SCALES = 256
"""In one request: what they take in an image's metadata must fit into a JPEG's segment."""

MAX_COMPONENT_SCALES = 16
"""In one use, if the model has no more components: so that a few wrong ones are told by name."""

_PATTERN = re.compile(r"[A-Za-z0-9_*?-]+(\.[A-Za-z0-9_*?-]+)*")
_MAX_PATTERN_CHARS = 128
_MAX_SHOWN_CHARS = 64


def settings_faults(field: str, use: adapter_pb2.AdapterUse, model: ModelInfo, num_steps: int) -> Iterator[FieldFault]:
    """Yields the faults of one use's component scales, block scales and schedule; *field* is the use's path."""
    seen: set[str] = set()
    for k, each in enumerate(use.component_scales):
        path = f"{field}.component_scales[{k}]"
        if each.component not in model.adaptable_components:
            known, given = ", ".join(model.adaptable_components), each.component[:_MAX_SHOWN_CHARS]
            yield FieldFault(f"{path}.component", f"{given!r} is no component of this model; it has {known}")
        elif each.component in seen:
            yield FieldFault(f"{path}.component", f"{each.component!r} is there twice")
        seen.add(each.component)
        yield from _factor(f"{path}.scale", each.scale)
    for k, block in enumerate(use.block_scales):
        path = f"{field}.block_scales[{k}]"
        if len(block.pattern) > _MAX_PATTERN_CHARS or not _PATTERN.fullmatch(block.pattern):
            detail = f"{block.pattern[:_MAX_PATTERN_CHARS]!r} is not parts of A-Z, a-z, 0-9, '_', '-', '*' and '?' "
            yield FieldFault(f"{path}.pattern", f"{detail}between dots, in at most {_MAX_PATTERN_CHARS} characters")
        yield from _factor(f"{path}.scale", block.scale)
    if use.HasField("schedule"):
        yield from _schedule(f"{field}.schedule", use, num_steps)


def count_faults(uses: Sequence[adapter_pb2.AdapterUse], model: ModelInfo) -> Iterator[FieldFault]:
    """Yields a fault if a request has too many block scales, or a use too many component scales for *model*.

    None of them should be looked at then.
    """
    most = len(model.adaptable_components)
    for place, use in enumerate(uses):
        if len(use.component_scales) > max(most, MAX_COMPONENT_SCALES):
            field = f"spec.adapters[{place}].component_scales"
            yield FieldFault(field, f"has {len(use.component_scales)} elements; the model has {most} components")
    if sum(len(use.block_scales) for use in uses) > MAX_BLOCK_SCALES:
        yield FieldFault("spec.adapters", f"have over {MAX_BLOCK_SCALES} block scales together")


def _schedule(field: str, use: adapter_pb2.AdapterUse, num_steps: int) -> Iterator[FieldFault]:
    settings = convert.use_settings(use)
    if not 0 <= settings.start <= 1:  # also for NaN
        yield FieldFault(f"{field}.start", f"is {settings.start}; must be from 0 to 1")
    elif not settings.start < settings.end <= 1:
        yield FieldFault(f"{field}.end", f"is {settings.end}; must be above start, at most 1")
    elif num_steps and not any(settings.acts_at(step, num_steps) for step in range(num_steps)):
        yield FieldFault(field, f"holds none of the {num_steps} steps: step k is at k / {num_steps}")


def _factor(field: str, value: float) -> Iterator[FieldFault]:
    if not -MAX_FACTOR <= value <= MAX_FACTOR:
        yield FieldFault(field, f"is {value}; must be from {-MAX_FACTOR:g} to {MAX_FACTOR:g}")

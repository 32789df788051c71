"""From an adapter's bytes to what they mean for a model: the one way that a load and a report without a server go.

Headers and configurations alone, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_server.adapters.formats.header import Buffer, Limits
from lora_server.adapters.formats.inputs import Model, Rules, SourceFile
from lora_server.adapters.formats.plan import Plan, make_plan
from lora_server.adapters.formats.sources import source_files


@dataclass(frozen=True, slots=True)
class Layout:
    """What the headers and configurations of an adapter's files say."""

    files: Sequence[SourceFile]
    plan: Plan


def understand(adapter: str, contents: Mapping[str, Buffer], model: Model, rules: Rules, limits: Limits) -> Layout:
    """Works out what files, by relative path, mean for *model*; errors as of `source_files` and `make_plan`."""
    files = source_files(adapter, contents, model.denoiser, limits)
    return Layout(files, make_plan(adapter, files, model, rules))

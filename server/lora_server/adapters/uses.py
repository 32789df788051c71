"""What a request asks of its adapters against what they are: only a version says which modules it changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_server.adapters.records import Version
from lora_server.errors import FieldFault, InvalidRequestError
from lora_server.types import AdapterUse
from lora_server.use_settings import covers

_EXAMPLES = 3


def check_uses(uses: Sequence[AdapterUse], found: Sequence[tuple[str, Version]]) -> None:
    """Checks the settings of *uses* against the (name, version) that each was resolved to.

    Raises:
        InvalidRequestError: With every setting that would silently do nothing.
    """
    faults = [
        fault
        for place, (use, (name, version)) in enumerate(zip(uses, found, strict=True))
        for fault in _faults(f"spec.adapters[{place}]", use, name, version)
    ]
    if faults:
        raise InvalidRequestError(faults)


def _faults(field: str, use: AdapterUse, name: str, version: Version) -> Iterator[FieldFault]:
    changed = [component.name for component in version.components]
    for k, (component, _) in enumerate(use.settings.component_scales):
        if component not in changed:
            detail = f"the adapter {name!r} does not change {component!r}, only {', '.join(changed)}"
            yield FieldFault(f"{field}.component_scales[{k}].component", detail)
    for k, (pattern, _) in enumerate(use.settings.block_scales):
        if not any(covers(pattern, path) for path in version.modules):
            detail = f"{pattern!r} matches no module that the adapter {name!r} changes{_examples(version)}"
            yield FieldFault(f"{field}.block_scales[{k}].pattern", detail)
    if use.settings.use_trigger_words and not version.trigger_words:
        yield FieldFault(f"{field}.use_trigger_words", f"the metadata of the adapter {name!r} has no trigger words")


def _examples(version: Version) -> str:
    if not version.modules:
        return ": it changes none of the denoiser"
    shown = ", ".join(version.modules[:_EXAMPLES])
    return f", such as {shown}" if len(version.modules) > _EXAMPLES else f", which are {shown}"

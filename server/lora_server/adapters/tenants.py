"""Which tenants may use which adapters. Pure rules over records; the manager holds its lock around every call.

An adapter that is bound to others does not exist for a tenant: every selector answers AdapterNotFoundError, as for a
name that nobody has. A tenant of None is the operator, for whom everything exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_server.adapters.registry import Record
from lora_server.errors import AdapterNotFoundError
from lora_server.types import AdapterSource, Tenants, may_use


def check_admitted(record: Record, tenant: str | None, asked: str | int) -> None:
    """Raises AdapterNotFoundError, about what was *asked* for, unless *tenant* may use *record*."""
    if not may_use(record.tenants, tenant):
        raise AdapterNotFoundError(asked)


def check_source(records: Iterable[Record], source: AdapterSource, folder: Path | None, tenant: str | None) -> None:
    """Checks a use by path: every name of the folder, and whoever has the name or id it asks for, must admit *tenant*.

    So a second name is no way around a binding, and a conflict tells nothing about an adapter of others. *folder* is
    None if it is not known yet.

    Raises:
        AdapterNotFoundError: If one does not.
    """
    for record in records:
        if record.source.path == source.path or (folder is not None and _share_files(record.folder, folder)):
            check_admitted(record, tenant, source.path)
        if source.name == record.name:
            check_admitted(record, tenant, record.name)
        if source.id is not None and source.id in record.ids:
            check_admitted(record, tenant, source.id)


def inherited(records: Iterable[Record], folder: Path) -> Tenants:
    """Returns who may use a new name of *folder*: those whom all its other names admit; None is everybody."""
    bound = [record.tenants for record in records if _share_files(record.folder, folder) and record.tenants is not None]
    return frozenset.intersection(*bound) if bound else None


def _share_files(folder: Path, other: Path) -> bool:
    """Whether two places may be of the same files: one place, or a folder and a bare file in it."""
    return folder == other or any(
        file.parent == place and file.suffix == ".safetensors" for file, place in ((folder, other), (other, folder))
    )

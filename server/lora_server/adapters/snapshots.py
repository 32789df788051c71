"""Records as the frozen values that leave the room."""

from __future__ import annotations

from collections.abc import Callable

from lora_server.adapters.records import Record, Version
from lora_server.types import AdapterInfo, AdapterState, VersionInfo


def adapter_info(record: Record, state_of: Callable[[Version], AdapterState]) -> AdapterInfo:
    """Returns a snapshot of a record, its versions the most recently loaded first."""
    return AdapterInfo(
        name=record.name,
        ids=tuple(record.ids),
        source=record.source,
        versions=tuple(_version_info(version, state_of(version)) for version in reversed(record.versions.values())),
        current_digest=record.current,
        pin=record.pin or record.lost_pin,
        default_scale=record.default_scale,
        tenants=record.tenants,
    )


def _version_info(version: Version, state: AdapterState) -> VersionInfo:
    return VersionInfo(
        digest=version.digest,
        size_bytes=version.size_bytes,
        rank=version.rank,
        components=version.components,
        state=state,
        load_time_s=version.load_time_s,
        last_use_time_s=version.last_use_time_s,
        failure=version.failure if state is AdapterState.FAILED else "",
        trigger_words=version.trigger_words,
        report=version.report,
    )

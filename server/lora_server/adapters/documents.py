"""Records as documents of the state file, and back. What is in caches, and who uses it, is no part of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lora_server.adapters.records import Record, StoredCopy, Version
from lora_server.adapters.state import Document, StateDamagedError
from lora_server.types import AdapterSource, ComponentSummary, LoadReport, PinInfo, PinLevel


def document_of(record: Record) -> Document:
    """What of *record* survives a restart: of its versions, the current one."""
    version, pin = record.current_version, record.pin or record.lost_pin
    return {
        "source": record.source.path,
        "folder": str(record.folder),
        "signature": record.signature,
        "ids": record.ids,
        "default_scale": record.default_scale,
        "allow_partial": record.allow_partial,
        "tenants": None if record.tenants is None else sorted(record.tenants),
        "pin": None if pin is None else {"level": pin.level.value, "expire_time_s": pin.expire_time_s},
        "stored": None if record.stored is None else asdict(record.stored),
        "version": {
            "digest": version.digest,
            "size_bytes": version.size_bytes,
            "rank": version.rank,
            "components": [asdict(each) for each in version.components],
            "load_time_s": version.load_time_s,
            "report": None if version.report is None else asdict(version.report),
        },
    }


def record_of(name: str, document: Document) -> Record:
    """The record of a document; its pin is one that has to be satisfied yet.

    Raises:
        StateDamagedError: If the document is not of this form.
    """
    try:
        version, pin, stored = document["version"], document["pin"], document["stored"]
        return Record(
            name=name,
            source=AdapterSource(document["source"]),
            folder=Path(document["folder"]),
            signature=tuple(tuple(entry) for entry in document["signature"]),
            versions={version["digest"]: _version(version)},
            current=version["digest"],
            ids=[int(adapter_id) for adapter_id in document["ids"]],
            default_scale=float(document["default_scale"]),
            allow_partial=bool(document["allow_partial"]),
            tenants=None if document["tenants"] is None else frozenset(document["tenants"]),
            lost_pin=None if pin is None else PinInfo(PinLevel(pin["level"]), pin["expire_time_s"]),
            stored=None if stored is None else StoredCopy(**stored),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StateDamagedError(f"the state of the adapter {name!r} cannot be understood ({error!r})") from error


def _version(fields: Document) -> Version:
    report = fields["report"]
    return Version(
        digest=fields["digest"],
        size_bytes=fields["size_bytes"],
        rank=fields["rank"],
        components=_components(fields["components"]),
        load_time_s=fields["load_time_s"],
        trigger_words=() if report is None else tuple(report["trigger_words"]),
        report=None if report is None else _report(report),
    )


def _report(fields: Document) -> LoadReport:
    tuples = {key: tuple(fields.get(key, ())) for key in ("kinds", "trigger_words", "unmatched_keys", "warnings")}
    return LoadReport(**{**fields, **tuples, "components": _components(fields["components"])})


def _components(listed: list[Document]) -> tuple[ComponentSummary, ...]:
    return tuple(ComponentSummary(**each) for each in listed)

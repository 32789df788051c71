"""What is remembered of an adapter and of its versions. Plain data, guarded by the manager's lock."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from lora_server.adapters.places import Place, place_by_name
from lora_server.adapters.source import UPLOAD_SCHEME, Signature
from lora_server.types import AdapterSource, ComponentSummary, Digest, LoadReport, PinInfo, Tenants


@dataclass(slots=True)
class Version:
    """What is remembered of a version, cached or not; times are Unix times in seconds."""

    digest: Digest
    size_bytes: int
    rank: int
    components: tuple[ComponentSummary, ...]
    load_time_s: float
    last_use_time_s: float | None = None
    failure: str = ""
    modules: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """The server's own copy of a pinned version: its digest, and the *key* under which the store has it."""

    key: Digest
    digest: Digest


class Standing(enum.Enum):
    """How a record came to be, and with that who finds it.

    A *draft* is what a request has read by a source and nobody finds, because it is not accepted yet. *On demand* is
    what is left of it then: its owner alone finds it, until it is forgotten for others that are used more. An operator
    *registers*; only that survives a restart. What is *gone* may still be drawn by requests that have it.
    """

    REGISTERED = "registered"
    ON_DEMAND = "on demand"
    DRAFT = "draft"
    FORGOTTEN = "forgotten"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Record:
    """One known adapter.

    Attributes:
        name: Its name.
        source: As its client sent it first.
        folder: What the source means, links resolved.
        signature: Of the files that the current version was read from.
        tenants: Who may use it (`adapters.tenants`); None is everybody.
        versions: By digest, the most recently loaded last.
        current: Digest of the version that new requests get.
        allow_partial: Whether tensors without a module are left out when it is read.
        lost_pin: A pin from before a restart that could not be satisfied yet.
        stored: The server's own copy of what is pinned, if its source lies elsewhere.
        standing: Who finds it.
        owner: The tenant whose request made it, unless an operator registered it; None is the operator.
        place: What a binding of it, and of others, is asked for.
        busy_until_s: Monotonic time until which its files are taken for being written, because they did not settle.
    """

    name: str
    source: AdapterSource
    folder: Path
    signature: Signature
    versions: dict[Digest, Version]
    current: Digest
    ids: list[int] = field(default_factory=list)
    default_scale: float = 1.0
    pin: PinInfo | None = None
    allow_partial: bool = False
    lost_pin: PinInfo | None = None
    stored: StoredCopy | None = None
    tenants: Tenants = None
    standing: Standing = Standing.REGISTERED
    owner: str | None = None
    busy_until_s: float = 0.0
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        """Knows its place by its path, until its files are looked at."""
        self.place = place_by_name(self.source.path, self.folder)

    @property
    def store_keys(self) -> set[Digest]:
        """What it needs of the server's own store."""
        keys = set() if self.stored is None else {self.stored.key}
        if self.source.path.startswith(UPLOAD_SCHEME):
            keys.add(self.source.path.removeprefix(UPLOAD_SCHEME))
        return keys

    def follows(self, source: AdapterSource) -> bool:
        """Whether *source* may take this record's place as its next version.

        An upload may that of an earlier one; and what a path means may have changed: a link was switched, a branch of
        the hub has moved.
        """
        mine, other = self.source.path, source.path
        return mine == other or (mine.startswith(UPLOAD_SCHEME) and other.startswith(UPLOAD_SCHEME))

    @property
    def is_partial(self) -> bool:
        """Whether the current version was read without some of its tensors."""
        report = self.current_version.report
        return report is not None and report.num_unmatched_keys > 0

    @property
    def current_version(self) -> Version:
        """The version that new requests get."""
        return self.versions[self.current]


@dataclass(frozen=True, slots=True)
class Tags:
    """What a source will be called: known before its files are read, so that a conflict costs nothing.

    Attributes:
        name: The name.
        id: The id, or None if the record has it.
        record: The record that has the name, if there is one.
    """

    name: str
    id: int | None
    record: Record | None

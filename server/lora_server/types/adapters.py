"""What adapters are called, where they come from and what is known of them.

Pure Python, no transport, no tensors; frozen values, safe to share between threads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from lora_server.use_settings import EVERYWHERE, UseSettings

Digest = str
"""Identity of a version: ``sha256:`` and 64 lower-case hex digits."""


Tenants = frozenset[str] | None
"""Who may use an adapter; None is everybody."""


DEFAULT_TENANT = "default"
"""Whose requests are that come without a tenant."""


def may_use(tenants: Tenants, tenant: str | None) -> bool:
    """Whether *tenant*, or the operator if it is None, may use what is bound to *tenants*."""
    return tenants is None or tenant is None or tenant in tenants


@dataclass(frozen=True, slots=True)
class Viewer:
    """As whom adapters are looked for.

    Attributes:
        tenant: The tenant whose bindings count; None for nobody's.
        is_operator: Whether bindings to others hide nothing.
        has_own: Whether what the tenant's own requests have named by sources is found as well.
    """

    tenant: str | None = None
    is_operator: bool = True
    has_own: bool = True


OPERATOR = Viewer()
"""Who finds everything that is registered."""


class AdapterState(enum.Enum):
    """Where a version of an adapter is."""

    REGISTERED = "registered"
    LOADING = "loading"
    CACHED = "cached"
    RESIDENT = "resident"
    FAILED = "failed"


class PinLevel(enum.Enum):
    """How close to the device a pinned adapter is kept."""

    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter's files are, with the tags its caller wishes.

    Attributes:
        path: Exactly as the client sent it; the stable id depends on every character.
        id: 1 to 2^63-1, or None for the stable id of the path.
        name: A valid name, or None for one made from the folder's name.
    """

    path: str
    id: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ByName:
    """Selects a registered adapter by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class ById:
    """Selects a registered adapter by one of its ids."""

    id: int


@dataclass(frozen=True, slots=True)
class ByDigest:
    """Selects one version, whatever its name."""

    digest: Digest


Selector = ByName | ById | ByDigest | AdapterSource
"""What may select an adapter in a request; a source is loaded on demand."""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter in a request.

    Attributes:
        selector: Which adapter.
        scale: Finite multiplier of its delta, or None for the adapter's default scale.
        expected_digest: If set, the version must have this digest.
        settings: Where and when it acts.
    """

    selector: Selector
    scale: float | None = None
    expected_digest: Digest | None = None
    settings: UseSettings = EVERYWHERE


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter as it is applied: a use that has been resolved to a version.

    *on_demand*: the name is one that only the tenant of the request finds.
    """

    name: str
    id: int
    digest: Digest
    scale: float
    settings: UseSettings = EVERYWHERE
    on_demand: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """What a version adapts in one component of the pipeline."""

    name: str
    num_modules: int
    min_rank: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was understood of an adapter's files.

    Attributes:
        dialect: Whose names the tensors have: `peft`, `diffusers`, `kohya`, `comfyui`, `ai-toolkit`, `onetrainer`,
            `lycoris`, `xlabs` or `bfl`.
        kinds: What the deltas are, sorted: `lora`, `rslora`, `dora`, `loha`, `lokr`, and with magnitudes `dora+loha`.
        min_rank, max_rank: As the files have it.
        min_alpha, max_alpha: As the files have it, or by the dialect's convention.
        components: Modules matched in each component, sorted by component; ranks are the files' own.
        size_bytes: Of the files.
        digest: Of the files.
        base_model: The model that the files name as their own; empty if they name none.
        title: The adapter's own title; empty if it has none.
        trigger_words: Words that the files say to put into a prompt, the most important first.
        suggested_scale: The scale that a file beside the weights suggests, or None. It is not applied by itself.
        num_unmatched_keys: Tensors that were left out, allowed by the caller.
        unmatched_keys: Their names, the first of them.
        merged_only: Whether the denoiser's deltas have no low-rank form that fits the slots.
        warnings: What was left out beside the files, or may be wrong with them; a sentence each.
    """

    dialect: str
    kinds: tuple[str, ...]
    min_rank: int
    max_rank: int
    min_alpha: float
    max_alpha: float
    components: tuple[ComponentSummary, ...]
    size_bytes: int
    digest: Digest
    base_model: str = ""
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    suggested_scale: float | None = None
    num_unmatched_keys: int = 0
    unmatched_keys: tuple[str, ...] = ()
    merged_only: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PinInfo:
    """An operator's pin; *expire_time_s* is Unix time, or None for no end."""

    level: PinLevel
    expire_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A snapshot of one version; times are Unix times in seconds."""

    digest: Digest
    size_bytes: int
    rank: int
    components: tuple[ComponentSummary, ...]
    state: AdapterState
    load_time_s: float | None
    last_use_time_s: float | None
    failure: str = ""
    trigger_words: tuple[str, ...] = ()
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class Glance:
    """What is seen at a glance of an adapter: where its current version is, whether it is pinned, and who finds it."""

    state: AdapterState
    is_pinned: bool = False
    is_on_demand: bool = False


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of a registered adapter; versions are the most recently loaded first."""

    name: str
    ids: tuple[int, ...]
    source: AdapterSource
    versions: tuple[VersionInfo, ...]
    current_digest: Digest
    pin: PinInfo | None
    default_scale: float
    tenants: Tenants = None

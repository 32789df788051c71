"""Which tenants may use which files. Pure rules; the manager holds its lock around every call.

| a binding | |
|---|---|
| is of | files: a place with all below it and all that holds it, or a repository of the hub with all its revisions |
| holds | for every name and every selector, registered before or after it |
| of several names of one place | admits the tenants of each of them; a name that is bound to nobody opens nothing |
| of several places that touch | admits whom each of them admits |

What is bound to others does not exist for a tenant. Equal bytes at another place are another thing: who has them there
needs no binding to have them. A tenant of None is the operator, for whom everything exists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from lora_server.adapters.places import Mark, Place
from lora_server.types import Tenants


class Bindings:
    """The bound places. Asking costs as many look-ups as a path has parts, however many are bound."""

    def __init__(self) -> None:
        self._bound: dict[Hashable, tuple[Place, frozenset[str]]] = {}
        self._at: defaultdict[Mark, set[Hashable]] = defaultdict(set)
        self._holding: defaultdict[Mark, set[Hashable]] = defaultdict(set)

    def __bool__(self) -> bool:
        """Whether anything is bound."""
        return bool(self._bound)

    def __iter__(self) -> Iterator[Hashable]:
        """Yields the holders."""
        return iter(self._bound)

    def put(self, holder: Hashable, place: Place, tenants: Tenants) -> None:
        """Binds *holder*'s place, in place of what it had bound; None ends that."""
        old = self._bound.pop(holder, None)
        if old is not None:
            _forget(self._at, old[0].itself, holder)
            _forget(self._holding, old[0].above, holder)
        if tenants is not None:
            self._bound[holder] = place, tenants
            for mark in place.itself:
                self._at[mark].add(holder)
            for mark in place.above:
                self._holding[mark].add(holder)

    def admits(self, place: Place, tenant: str | None) -> bool:
        """Whether *tenant* may use what lies at *place*."""
        if tenant is None or not self._bound:
            return True
        around = self._touching(self._at, place.itself | place.above) | self._touching(self._holding, place.itself)
        return all(tenant in tenants for tenants in self._by_group(around))

    def inherited(self, place: Place) -> Tenants:
        """Returns who may use a new name of *place*: those whom it, and what holds it, are bound to; None for all."""
        bound = self._by_group(self._touching(self._at, place.itself | place.above))
        return frozenset.intersection(*bound) if bound else None

    def _touching(self, index: dict[Mark, set[Hashable]], marks: Iterable[Mark]) -> set[Hashable]:
        return set().union(*(index[mark] for mark in marks if mark in index))

    def _by_group(self, holders: Iterable[Hashable]) -> list[frozenset[str]]:
        groups: defaultdict[Mark, frozenset[str]] = defaultdict(frozenset)
        for holder in holders:
            place, tenants = self._bound[holder]
            groups[place.group] |= tenants
        return list(groups.values())


def _forget(index: dict[Mark, set[Hashable]], marks: Iterable[Mark], holder: Hashable) -> None:
    for mark in marks:
        index[mark].discard(holder)
        if not index[mark]:
            del index[mark]


class HubGrants:
    """Which repositories of the hub the requests of a tenant may name; operators load any."""

    def __init__(self, grants: Sequence[str] = (), *, everything: bool = True) -> None:
        """*grants* are `TENANT=OWNER/NAME`, with `*` for any tenant, owner or name, or the beginning of one.

        Without any, *everything* says whether all tenants may name all.
        """
        self._everything = everything and not grants
        self._grants = [(tenant, pattern.casefold()) for tenant, _, pattern in (each.partition("=") for each in grants)]

    def admits(self, tenant: str | None, repository: str) -> bool:
        """Whether requests of *tenant*, None for the operator, may name *repository*, OWNER/NAME."""
        if tenant is None or self._everything:
            return True
        owner, _, name = repository.casefold().partition("/")
        return any(
            whose in ("*", tenant) and fnmatchcase(owner, _part(pattern, 0)) and fnmatchcase(name, _part(pattern, 2))
            for whose, pattern in self._grants
        )


def _part(pattern: str, place: int) -> str:
    """Owner (0) or name (2) of a pattern: no `*` stands for both."""
    return pattern.partition("/")[place]

"""Which images step together, and how their adapters are applied: a pure function of what there is and what it costs.

Every possible batch is scored by seconds per image and step: images of one shape together with open pages (*slots*), or
those of one composition with their weights merged, or base images alone. The cheapest wins; so at small sizes, where
batching pays, mixed images share a step, and at large ones a lone composition runs merged.

**Nobody is held up.** An image is overdue whose tenant, or request, is behind its fair share of the work by as much
as it may be (`scheduler/fair_clock`). While there are overdue images, the batch holds the most overdue one. Beside it
step images that are behind as well; those that are ahead only as far as they do not double the time of the step. So
nobody, whoever else is served, is behind by more than he may, a batch, and a step of each other one that is overdue
(a property test holds this).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from lora_server.types import ApplicationWay, Digest


class Candidate(Protocol):
    """What the policy asks of an image that has steps left; compared by identity."""

    @property
    def shape(self) -> Hashable:
        """Images of equal shape can step together."""
        ...

    @property
    def rows(self) -> int:
        """Rows that it adds to a batch."""
        ...

    @property
    def latent_pixels(self) -> int:
        """What it adds to a batch's memory."""
        ...

    @property
    def composition(self) -> Hashable:
        """Names what it uses of the denoiser at its next step; falsy is the base."""
        ...

    @property
    def takes_slots(self) -> bool:
        """Whether the composition can be applied from pages; if not, it only ever runs merged."""
        ...

    @property
    def ranks(self) -> Mapping[Digest, int]:
        """Rank of each adapter of the composition."""
        ...

    @property
    def remaining_steps(self) -> int:
        """Steps that it has left, at least 1."""
        ...

    @property
    def behind(self) -> float:
        """How far it is behind its fair share of the work, in what it may be; overdue from 1 on, negative if ahead."""
        ...


class Costs(Protocol):
    """What the policy asks of `scheduler.costs.StepCosts`."""

    @property
    def switch_s(self) -> float:
        """Seconds to write another composition into the weights."""
        ...

    def step_s(self, shape: Hashable, rows: int, *, slots: bool) -> float:
        """Seconds of one step."""
        ...


class Pages(Protocol):
    """What the policy asks of `scheduler.pages.PageTable`."""

    @property
    def num_pages(self) -> int:
        """All pages."""
        ...

    def pages_for(self, rank: int) -> int:
        """Pages of an adapter."""
        ...


CandidateT = TypeVar("CandidateT", bound=Candidate)

_MOST_SLOWED = 2.0
"""How many times as long the step of an overdue image may take for those beside it that are ahead of their share."""
_STEPS_OF_A_SWITCH = 32
"""The most steps over which a change of the weights is spread."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of a batch.

    Attributes:
        max_images, max_rows, max_latent_pixels: The most that may step together; one image always may.
        mixes: Whether different compositions may share a batch at all.
    """

    max_images: int
    max_rows: int
    max_latent_pixels: int = 2**62
    mixes: bool = True


@dataclass(frozen=True, slots=True)
class Batch(Generic[CandidateT]):
    """What steps next."""

    members: tuple[CandidateT, ...]
    way: ApplicationWay


def choose_batch(
    candidates: Sequence[CandidateT],
    rules: Rules,
    costs: Costs,
    pages: Pages,
    merged: Hashable,
) -> Batch[CandidateT] | None:
    """Returns the next batch; None if there is nothing to step.

    *candidates* are in the order of their arrival, which breaks ties; *merged* names what the weights hold now,
    None if that is not known.
    """
    lead = _most_overdue(candidates)
    pool = candidates if lead is None else _company(lead, candidates, rules, costs)
    best: Batch[CandidateT] | None = None
    best_cost = 0.0
    for batch in _options(pool, lead, rules, pages):
        cost = _cost(batch, costs, merged)
        if best is None or cost < best_cost * (1 - 1e-9):
            best, best_cost = batch, cost
    return best


def _most_overdue(candidates: Sequence[CandidateT]) -> CandidateT | None:
    most = max(candidates, key=lambda each: each.behind, default=None)  # of equals, who came first
    return most if most is not None and most.behind >= 1 else None


def _company(lead: CandidateT, candidates: Sequence[CandidateT], rules: Rules, costs: Costs) -> Sequence[CandidateT]:
    """Who may step with an overdue image, which comes first; see the module's docstring."""
    others = [each for each in candidates if each is not lead and each.shape == lead.shape]
    company = [lead, *(each for each in others if each.behind >= 0)][: rules.max_images]
    rows = sum(each.rows for each in company)
    limit_s = _MOST_SLOWED * costs.step_s(lead.shape, rows, slots=False)
    for each in (each for each in others if each.behind < 0):
        rows += each.rows
        if costs.step_s(lead.shape, rows, slots=False) > limit_s:
            break
        company.append(each)
    return company


def _options(
    pool: Sequence[CandidateT], lead: CandidateT | None, rules: Rules, pages: Pages
) -> Iterator[Batch[CandidateT]]:
    """Yields the batches to compare; each holds *lead*, if there is one."""
    for members in _grouped(pool, lambda each: each.shape):
        compositions = _grouped(members, lambda each: each.composition)
        for group in compositions:
            if lead is None or group[0].composition == lead.composition:
                way = ApplicationWay.MERGED if group[0].composition else ApplicationWay.BASE
                yield from (Batch(part, way) for part in _prefixes(group, rules))
        if rules.mixes and any(each.composition for each in members):
            fitting = _fitting(members, pages)
            yield from (
                Batch(part, ApplicationWay.SLOTS)
                for part in _prefixes(fitting, rules)
                if any(each.composition for each in part) and (lead is None or part[0] is lead)
            )


def _grouped(members: Iterable[CandidateT], key: object) -> list[list[CandidateT]]:
    assert callable(key)
    groups: dict[Hashable, list[CandidateT]] = {}
    for each in members:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _prefixes(members: Sequence[CandidateT], rules: Rules) -> Iterator[tuple[CandidateT, ...]]:
    """Yields the first 1, 2, ... members within the bounds; the first alone always."""
    rows = pixels = 0
    for count, each in enumerate(members[: rules.max_images], start=1):
        rows += each.rows
        pixels += each.latent_pixels
        if count > 1 and (rows > rules.max_rows or pixels > rules.max_latent_pixels):
            return
        yield tuple(members[:count])


def _fitting(members: Iterable[CandidateT], pages: Pages) -> list[CandidateT]:
    """The members, first come first served, whose adapters may lie in pages and fit into them together."""
    taken: dict[Digest, int] = {}
    fitting = []
    for each in (each for each in members if each.takes_slots):
        needed = taken | {digest: pages.pages_for(rank) for digest, rank in each.ranks.items()}
        if sum(needed.values()) <= pages.num_pages:
            taken = needed
            fitting.append(each)
    return fitting


def _cost(batch: Batch[CandidateT], costs: Costs, merged: Hashable) -> float:
    """Seconds per image and step; a change of the weights is shared by the steps that will use it."""
    first = batch.members[0]
    rows = sum(each.rows for each in batch.members)
    seconds = costs.step_s(first.shape, rows, slots=batch.way is ApplicationWay.SLOTS)
    wanted = first.composition if batch.way is ApplicationWay.MERGED else ()
    if wanted != merged:
        steps = max(each.remaining_steps for each in batch.members)
        seconds += costs.switch_s / max(1, min(steps, _STEPS_OF_A_SWITCH))
    return seconds / len(batch.members)

"""The load report: what was understood of an adapter's files, in one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_server.adapters.formats.facts import read_facts
from lora_server.adapters.formats.inputs import SourceFile
from lora_server.adapters.formats.modules import ModulePlan
from lora_server.adapters.formats.plan import Plan
from lora_server.types import ComponentSummary, Digest, LoadReport

_MAX_UNMATCHED = 50


def make_report(
    adapter: str,
    plan: Plan,
    files: Sequence[SourceFile],
    origin: tuple[Digest, int],
    cards: Mapping[str, bytes],
    *,
    merged_only: bool = False,
) -> LoadReport:
    """Reports on a *plan*; *origin* is the digest and the bytes of all files that count.

    Raises:
        AdapterMalformedError: If a card that is written for this server is not what it should be.
    """
    facts = read_facts(adapter, files, cards)
    digest, size_bytes = origin
    ranks, alphas = [m.rank for m in plan.modules], [m.alpha for m in plan.modules]
    return LoadReport(
        dialect=plan.dialect,
        kinds=plan.kinds,
        min_rank=min(ranks),
        max_rank=max(ranks),
        min_alpha=min(alphas),
        max_alpha=max(alphas),
        components=_components(plan.modules),
        size_bytes=size_bytes,
        digest=digest,
        base_model=facts.base_model,
        title=facts.title,
        trigger_words=facts.trigger_words,
        suggested_scale=facts.suggested_scale,
        num_unmatched_keys=len(plan.unmatched),
        unmatched_keys=plan.unmatched[:_MAX_UNMATCHED],
        merged_only=merged_only,
    )


def _components(modules: Sequence[ModulePlan]) -> tuple[ComponentSummary, ...]:
    found: dict[str, list[ModulePlan]] = {}
    for module in modules:
        found.setdefault(module.component, []).append(module)
    return tuple(
        ComponentSummary(
            name=component,
            num_modules=sum(max(1, len(module.parts)) for module in members),
            min_rank=min(module.rank for module in members),
            max_rank=max(module.rank for module in members),
        )
        for component, members in sorted(found.items())
    )

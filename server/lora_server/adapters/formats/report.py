"""The load report: what was understood of an adapter's files, in one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_client.console import printable

from lora_server.adapters.companions import NOTHING, Companions, stem_of
from lora_server.adapters.formats.facts import read_facts
from lora_server.adapters.formats.keys import is_embedding
from lora_server.adapters.formats.layout import Layout
from lora_server.adapters.formats.modules import ModulePlan
from lora_server.adapters.formats.plan import Plan
from lora_server.types import ComponentSummary, Digest, LoadReport

_MAX_UNMATCHED = 50
_MAX_WARNINGS = 16
_MAX_WARNING_CHARS = 400


def make_report(
    adapter: str,
    layout: Layout,
    origin: tuple[Digest, int],
    cards: Mapping[str, bytes],
    beside: Companions = NOTHING,
    *,
    merged_only: bool = False,
) -> LoadReport:
    """Reports on a *layout*; *origin* is the digest and the bytes of all files that count, *beside* what does not.

    Raises:
        AdapterMalformedError: If a card that is written for this server is not what it should be.
    """
    plan = layout.plan
    facts = read_facts(adapter, layout.files, cards, _new_words(plan, beside))
    warnings = [*beside.check(adapter, allow_partial=True), *plan.warnings]
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
        warnings=tuple(printable(warning[:_MAX_WARNING_CHARS]) for warning in warnings[:_MAX_WARNINGS]),
    )


def _new_words(plan: Plan, beside: Companions) -> set[str]:
    """The words of embeddings that are left out: placeholders that trainers use, and names of files and tensors."""
    inside = {part for key in plan.unmatched if is_embedding(key) for part in key.split(".")}
    outside = {part for name in beside.embeddings for part in (stem_of(name), stem_of(name).rpartition("_")[0])}
    found = inside | outside
    return found - {""} | {"TOK"} if found else set()


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

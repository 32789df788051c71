"""What a soak found: figures, a table, and the faults that make it fail."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.soak.ledger import Ledger
from tests.soak.outcome import OutageLike, Outcome, is_expected

SHOWN = 20
"""The most faults of a kind that are written out."""


def wrong_answers(outcomes: Sequence[Outcome], ledger: Ledger) -> list[str]:
    """Pictures that are not what they should be, and versions that were not current at any moment of the request."""
    found = [f"{outcome.kind}: {fault}" for outcome in outcomes for fault in outcome.faults]
    for each in outcomes:
        if each.name and each.digest and not ledger.possible(each.name, each.digest, each.began_s, each.ended_s):
            found.append(f"{each.kind}: {each.name} was {each.digest[:15]}, which was not current at that time")
    return found


def unexpected_errors(outcomes: Sequence[Outcome], outages: Sequence[OutageLike]) -> list[str]:
    """Errors that nothing explains."""
    return [
        f"{each.kind}{f' of {each.name}' if each.name else ''}: {each.error}: {each.detail}"
        for each in outcomes
        if not is_expected(each, outages)
    ]


def unavailabilities(outcomes: Sequence[Outcome], outages: Sequence[OutageLike]) -> list[float]:
    """Seconds from each kill to the end of the next request that got its pictures."""
    ends = sorted(each.ended_s for each in outcomes if each.drew)
    found = []
    for outage in outages:
        after = next((end for end in ends if end > (outage.serving_s or float("inf"))), None)
        found.append(float("inf") if after is None else after - outage.killed_s)
    return found


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Requests by kind and by how they ended."""
    drawn = sorted(each.ended_s - each.began_s for each in outcomes if each.drew)
    return {
        "requests": len(outcomes),
        "pictures": sum(each.images for each in outcomes if each.drew),
        "by_kind": dict(Counter(each.kind for each in outcomes)),
        "by_error": dict(Counter(f"{each.kind}: {each.error}" for each in outcomes if each.error)),
        "p50_s": statistics.median(drawn) if drawn else None,
        "max_s": drawn[-1] if drawn else None,
    }


def machine() -> str:
    """The machine in a few words."""
    import os

    import torch

    return f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}, torch {torch.__version__}"


def table(results: dict[str, Any]) -> str:
    """The results as lines of a table in Markdown."""
    leak, verdict = results["memory"], results["faults"]
    rows = [
        ("minutes of load, machine", f"{results['minutes']:g}, {results['machine']}"),
        ("requests (pictures)", f"{results['requests']} ({results['pictures']})"),
        *((f"requests: {kind}", count) for kind, count in results["by_kind"].items()),
        *((f"fault: {kind}", count) for kind, count in results["injected"].items()),
        ("changes that were acknowledged", results["acknowledged"]),
        ("changes whose outcome a kill left open", results["left_open"]),
        ("longest unavailability, from kill to the next picture", f"{max(results['unavailable_s'], default=0):.1f} s"),
        ("all unavailabilities", ", ".join(f"{each:.1f} s" for each in results["unavailable_s"])),
        (
            f"memory over {leak['undisturbed_s']:.0f} s of one process",
            f"{leak['before'] / 2**20:.0f} to {leak['after'] / 2**20:.0f} MiB, peak {leak['peak'] / 2**20:.0f},"
            f" line {leak['slope_a_minute'] / 2**20:+.2f} MiB a minute",
        ),
        *((kind.replace("_", " "), len(found)) for kind, found in verdict.items()),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

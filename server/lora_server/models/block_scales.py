"""Block scales on packed deltas: every linear of a group gets the factor of its own path."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_server.models.weights import AdapterTargets, AdapterWeights, GroupDelta, linear_groups
from lora_server.use_settings import BlockScales, block_factor


def scale_blocks(delta: GroupDelta, paths: Sequence[str], block_scales: BlockScales) -> GroupDelta | None:
    """Returns *delta* with the factors in its B; None if they leave nothing of it.

    *paths* are those of the group's linears. Linears of factor 0 are left out, so that they stay the base bit for bit.
    """
    if not block_scales:
        return delta
    factors = [block_factor(block_scales, paths[member]) for member in delta.members]
    kept = [k for k, factor in enumerate(factors) if factor]
    if not kept:
        return None
    index = torch.tensor(kept, device=delta.b.device)
    exact = torch.promote_types(delta.b.dtype, torch.float32)  # in a half type the factors alone would be off by 0.4%
    by_linear = torch.tensor([factors[k] for k in kept], dtype=exact, device=delta.b.device)
    members = tuple(delta.members[k] for k in kept)
    scaled = (delta.b[index] * by_linear[:, None, None]).to(delta.b.dtype)
    return GroupDelta(delta.group, members, delta.a[index], scaled)


def changed_paths(weights: AdapterWeights, component: str, targets: AdapterTargets) -> tuple[str, ...]:
    """The paths of the modules that *weights* change in *component*."""
    if not weights.changes(component):
        return ()
    groups = linear_groups(targets[component])
    low_rank = ((delta.group, member) for delta in weights.groups.get(component, ()) for member in delta.members)
    formulas = ((each.group, each.member) for each in weights.formulas.get(component, ()))
    return tuple(groups[group].paths[member] for group, member in (*low_rank, *formulas))

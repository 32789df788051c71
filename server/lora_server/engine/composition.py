"""What an image uses of the denoiser at each of its steps, worked out once when it becomes active.

A composition is of one step: an adapter whose schedule does not hold the step is no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_server.models.merge import CompositionKey, ScaledAdapter, composition_key
from lora_server.types import Digest

Composition = Sequence[ScaledAdapter]


@dataclass(frozen=True, slots=True)
class Phase:
    """A composition during some of an image's steps.

    Attributes:
        members: The adapters that act.
        key: What they do to the denoiser.
        ranks: Rank of each of them that changes the denoiser.
        takes_slots: Whether pages can hold them; not with block scales, for a row has one gate for all linears, and
            not what has no low-rank form.
    """

    members: tuple[ScaledAdapter, ...]
    key: CompositionKey
    ranks: Mapping[Digest, int]
    takes_slots: bool


def phases(composition: Composition, denoiser: str, num_steps: int) -> list[Phase]:
    """Returns the phase of each of *num_steps* steps; steps with the same adapters share one."""
    made: dict[tuple[bool, ...], Phase] = {}
    found = []
    for step in range(num_steps):
        acting = tuple(member.settings.acts_at(step, num_steps) for member in composition)
        if acting not in made:
            members = tuple(member for member, acts in zip(composition, acting, strict=True) if acts)
            made[acting] = _phase(members, denoiser)
        found.append(made[acting])
    return found


def _phase(members: tuple[ScaledAdapter, ...], denoiser: str) -> Phase:
    changing = [member for member in members if member.scale_in(denoiser)]
    return Phase(
        members,
        composition_key(members, denoiser),
        {member.digest: member.weights.component_rank(denoiser) for member in changing},
        not any(member.settings.block_scales or member.weights.merged_only(denoiser) for member in changing),
    )


def for_text(composition: Composition) -> list[ScaledAdapter]:
    """*composition* as the text encoders see it: without block scales, which are the denoiser's own."""
    return [replace(each, settings=replace(each.settings, block_scales=())) for each in composition]

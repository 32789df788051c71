"""Which images step together; pure functions of what there is.

In this release a batch holds the images of one request. The images that stand first go first, so that an early image
is finished, sent and forgotten before a late one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Steppable(Protocol):
    """What the policy asks of an image: whether it has steps left."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        ...


StateT = TypeVar("StateT", bound=Steppable)


def choose_batch(states: Sequence[StateT], max_batch_images: int) -> list[StateT]:
    """Returns the first unfinished images, at most *max_batch_images*; an empty list if all are finished."""
    return [state for state in states if not state.finished][:max_batch_images]

"""Where and when an adapter of a request acts: factors by component and by block, and a schedule over the steps.

Pure values and arithmetic. Every factor multiplies the use's scale; what no factor names keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

BlockScales = tuple[tuple[str, float], ...]
"""(pattern, factor): see `block_factor`."""

MAX_TRIGGER_CHARS = 1000
"""What the trigger words of one adapter may add to a prompt."""

_TOLERANCE = 1e-6
"""Far below one step of any request, far above the rounding of a float32 fraction such as 1/3."""


@dataclass(frozen=True, slots=True)
class UseSettings:
    """How one use of an adapter differs from "everywhere, at all steps".

    Attributes:
        component_scales: (component, factor), each component at most once.
        block_scales: (pattern, factor) for modules of the denoiser.
        start, end: Fractions of the steps, 0 to 1, between which the adapter changes the denoiser.
        use_trigger_words: Whether the adapter's trigger words come before the prompt.
    """

    component_scales: tuple[tuple[str, float], ...] = ()
    block_scales: BlockScales = ()
    start: float = 0.0
    end: float = 1.0
    use_trigger_words: bool = False

    @property
    def scheduled(self) -> bool:
        """Whether there may be steps at which the adapter does not act."""
        return (self.start, self.end) != (0.0, 1.0)

    def component_factor(self, component: str) -> float:
        """The factor in *component*; 1 if none is given."""
        return dict(self.component_scales).get(component, 1.0)

    def acts_at(self, step_index: int, num_steps: int) -> bool:
        """Whether the adapter changes the denoiser at step *step_index*, from 0, of *num_steps*."""
        done = step_index / num_steps
        return self.start - _TOLERANCE <= done < self.end - _TOLERANCE


EVERYWHERE = UseSettings()
"""The adapter acts everywhere, at all steps, with the use's scale."""


def block_factor(block_scales: BlockScales, path: str) -> float:
    """The factor for the module at *path*; 1 if no pattern matches it.

    Of several that match, the one with the most parts counts, and of equals the last.
    """
    matching = [(pattern.count("."), place) for place, (pattern, _) in enumerate(block_scales) if covers(pattern, path)]
    return block_scales[max(matching)[1]][1] if matching else 1.0


def covers(pattern: str, path: str) -> bool:
    """Whether *path* begins with the parts of *pattern*, each a name or a glob: `blocks.3` is not of `blocks.31`."""
    wanted, parts = pattern.split("."), path.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def with_trigger_words(prompt: str, words: Sequence[str]) -> str:
    """Puts *words* in front of a prompt, in their order."""
    return ", ".join([*words, prompt])

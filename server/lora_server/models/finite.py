"""Whether networks give finite values, asked on their device without waiting for it.

Looked at are borders: embeddings, predictions, latents, decoded images. What is not finite inside a network and
vanishes there is the network's own business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DEEP_OUTPUTS = 2
"""Of a list of hidden states, pipelines read the last or the last but one."""


def peaks(batch: Tensor) -> Tensor:
    """The largest magnitude in each row of (B, ...), (B,): finite if and only if all of the row is.

    On the CPU fifteen times faster than the norm of that name.
    """
    return batch.abs().amax(dim=tuple(range(1, batch.ndim)))


class FiniteCheck:
    """Peaks of some rows by subject, on their way to the host. Engine thread only.

    A subject is the place of an image in its batch. The peaks are reduced and copied on the current stream.
    """

    def __init__(self) -> None:
        self._subjects: list[tuple[int, str]] = []
        self._peaks: list[Tensor] = []
        self._host: Tensor | None = None

    def add(self, subjects: Sequence[int], component: str, batch: Tensor) -> None:
        """Adds what *component* gave, a row for each of *subjects*; whole numbers are finite."""
        if batch.is_floating_point():
            self.add_peaks(subjects, component, peaks(batch))

    def add_peaks(self, subjects: Sequence[int], component: str, found: Tensor) -> None:
        """The same for rows whose peaks, (B,), are known."""
        self._subjects += [(subject, component) for subject in subjects]
        self._peaks.append(found)

    def send(self) -> FiniteCheck:
        """Copies the peaks to the host; returns itself. Nothing is added afterwards."""
        if self._peaks:
            found = torch.cat(self._peaks)
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
            self._host.copy_(found, non_blocking=True)
            self._peaks = []
        return self

    def faulty(self) -> dict[int, str]:
        """The subjects that are not finite, each with the first component that made it so.

        To be asked when the stream has done what it was given up to `send`.
        """
        found: dict[int, str] = {}
        values = [] if self._host is None else self._host.tolist()
        for (subject, component), peak in zip(self._subjects, values, strict=True):
            if not math.isfinite(peak):
                found.setdefault(subject, component)
        return found


class OutputWatch:
    """Notes the peaks of what modules give, where the caller does not see it. Not thread-safe."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Hooks *modules*, by the names of their components, until `close`."""
        self._found: list[tuple[str, Tensor]] = []
        self._hooks = [module.register_forward_hook(self._noting(name)) for name, module in modules.items()]

    def take(self) -> list[tuple[str, Tensor]]:
        """What was given since the last call: components with peaks, (1,), in order."""
        found, self._found = self._found, []
        return found

    def first_not_finite(self) -> str | None:
        """Takes what there is; returns the component of the first output that is not finite. Waits for the device."""
        return next((name for name, peak in self.take() if not math.isfinite(peak.item())), None)

    def close(self) -> None:
        """Removes the hooks; idempotent."""
        for hook in self._hooks:
            hook.remove()

    def _noting(self, name: str) -> Any:
        def note(_: nn.Module, __: object, output: object) -> None:
            self._found += [(name, peaks(each.flatten()[None])) for each in _tensors(output) if each.numel()]

        return note


def _tensors(output: object) -> Iterator[Tensor]:
    """The floats in what a module returned: itself, or its fields; of fields that are lists, the last ones."""
    fields = list(output.values()) if isinstance(output, Mapping) else output
    for each in fields if isinstance(fields, (list, tuple)) else [fields]:
        for tensor in each[-_DEEP_OUTPUTS:] if isinstance(each, (list, tuple)) else [each]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield tensor

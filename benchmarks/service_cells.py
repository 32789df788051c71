"""The cells that are measured on the service: steps, closed and open loads, popularity profiles, cold adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_client import LoraClient
from lora_server.models.base import adapter_targets

from benchmarks import cold, load, steps
from benchmarks.adapters import write_adapters
from benchmarks.cold import Cold
from benchmarks.presets import Preset
from benchmarks.service import Running

_UNSEEN = 110

Measure = Callable[[str, Callable[[], dict[str, Any]]], None]
"""Runs an action for the cell of a name, and keeps what it returns."""


class ServiceCells:
    """Cells of one running service."""

    def __init__(
        self, running: Running, preset: Preset, root: Path, arguments: argparse.Namespace, measure: Measure
    ) -> None:
        """Writes and loads the adapters that the cells use."""
        self._running = running
        self._preset = preset
        self._root = root
        self._arguments = arguments
        self._measure = measure
        paths = self._write(root, arguments.count)
        with LoraClient(running.address, timeout_s=600) as client:
            self._names = [client.adapters.load(str(path), name=path.name).name for path in paths]

    def measure(self, size: int, cells: set[str]) -> None:
        """Measures the cells that every size has: steps, and a closed load."""
        if "steps" in cells:
            self._measure(f"steps {size}", lambda: steps.measure(self._running, self._preset, size))
        if "closed" in cells:
            for count in (int(n) for n in self._arguments.adapters_used.split(",")):
                self._load(f"closed {size} adapters {count}", size, self._names[:count])

    def measure_unloaded(self, size: int, cells: set[str]) -> None:
        """Measures the cells of one size: open loads, popularity profiles, cold adapters."""
        if "open" in cells:
            for rate in (float(r) for r in self._arguments.rates.split(",")):
                self._load(f"open {size} rate {rate:g}", size, self._names[:16], rate=rate)
        if "popular" in cells:
            for profile in self._arguments.profiles.split(","):
                self._load(f"popular {size} {profile}", size, self._names, profile=profile)
        if "cold" in cells:
            unseen = tuple(map(str, self._write(self._root / "unseen", _UNSEEN)))
            wanted = Cold(
                self._running.address,
                tuple(self._names[:2]),
                unseen,
                size,
                self._preset.steps,
                self._preset.guidance_scale,
            )
            self._measure(f"cold {size}", lambda: cold.run(wanted))

    def _write(self, folder: Path, count: int) -> list[Path]:
        family = self._running.core.family
        return write_adapters(folder, adapter_targets(family.components), count, self._arguments.ranks, family.dtype)

    def _load(self, cell: str, size: int, names: list[str], **changes: Any) -> None:
        fields: dict[str, Any] = {
            "address": self._running.address,
            "adapters": tuple(names),
            "side_px": size,
            "steps": self._preset.steps,
            "guidance_scale": self._preset.guidance_scale,
            "seconds": self._arguments.seconds,
            "warm": 4,
            **changes,
        }
        if "rate" not in changes:
            fields["concurrency"] = self._arguments.concurrency
        self._measure(cell, lambda: load.run(load.Load(**fields)))

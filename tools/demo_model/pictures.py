"""Pictures in bulk: batches of rendered scenes for the trainers, with their captions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tools.demo_model.render import LOOKS, Canvas
from tools.demo_model.scenes import Scene, SceneTensors, sample_scene, to_tensors
from tools.demo_model.shapes import distance_table


class Studio:
    """A stock of scenes on a device, painted on demand in any look."""

    def __init__(self, count: int, device: torch.device, *, seed: int, held_out: bool = False) -> None:
        rng = random.Random(seed)
        self.scenes: list[Scene] = [sample_scene(rng, held_out=held_out) for _ in range(count)]
        self.tensors: SceneTensors = to_tensors(self.scenes, rng, device)
        self._table = distance_table(device)

    def __len__(self) -> int:
        return len(self.scenes)

    def paint(self, index: Tensor, look: str) -> Tensor:
        """Paints the scenes at *index*, (B,): returns (B, 3, H, W) in 0..1."""
        picked = SceneTensors(**{name: value[index] for name, value in vars(self.tensors).items()})
        return LOOKS[look](Canvas(picked, self._table))

    def paint_mixed(self, index: Tensor, looks: Sequence[str] = tuple(LOOKS)) -> Tensor:
        """Paints equal parts of the scenes in each look, in order."""
        return torch.cat([self.paint(part, look) for part, look in zip(index.chunk(len(looks)), looks, strict=True)])

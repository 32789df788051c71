"""What can be drawn and how it is said: the grammar of captions, and scenes as tensors.

A scene has one or two objects (shape, colour, size, place) on a coloured background. Captions that are held out by
their checksum are never trained on; the evaluation draws from those alone.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
COLOURS = {
    "red": (0.90, 0.13, 0.16),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.86, 0.10),
    "green": (0.16, 0.66, 0.24),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.13, 0.32, 0.90),
    "purple": (0.54, 0.18, 0.78),
    "pink": (1.00, 0.45, 0.70),
}
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.95),
    "grey": (0.62, 0.64, 0.67),
    "black": (0.09, 0.09, 0.11),
    "navy": (0.10, 0.14, 0.34),
    "sky": (0.68, 0.86, 0.98),
    "mint": (0.72, 0.94, 0.80),
    "peach": (1.00, 0.84, 0.70),
    "lilac": (0.84, 0.76, 0.96),
}
SIZES = ("small", "", "big")
SINGLE_PLACES = ("", "left", "right", "top", "bottom")
PAIR_PLACES = (("left", "right"), ("top", "bottom"))
SIDE_PX = 128
SINGLE_OFFSET_PX = 22
PAIR_OFFSET_PX = 30
SINGLE_RADII_PX = {"small": 19.0, "": 28.0, "big": 37.0}
PAIR_RADII_PX = {"small": 16.0, "": 21.0, "big": 26.0}
_DIRECTIONS = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_HELD_OUT_SHARE = 10

WORDS = sorted(
    {
        "a",
        "and",
        "on",
        "background",
        "left",
        "right",
        "top",
        "bottom",
        "small",
        "big",
        *SHAPES,
        *COLOURS,
        *BACKGROUNDS,
    }
)


@dataclass(frozen=True)
class Thing:
    """One object, in the words of the grammar."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def caption(self) -> str:
        """The scene in words, such as `a small blue ring top on a mint background`."""
        parts = [
            " ".join(word for word in ("a", thing.size, thing.colour, thing.shape, thing.place) if word)
            for thing in self.things
        ]
        return f"{' and '.join(parts)} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether the caption is kept from training; one in ten is."""
        return zlib.crc32(self.caption.encode()) % _HELD_OUT_SHARE == 0

    def centre_px(self, thing: Thing) -> tuple[float, float]:
        """Where one of its objects stands: x and y."""
        offset = SINGLE_OFFSET_PX if len(self.things) == 1 else PAIR_OFFSET_PX
        x, y = _DIRECTIONS[thing.place]
        return SIDE_PX / 2 + offset * x, SIDE_PX / 2 + offset * y

    def radius_px(self, thing: Thing) -> float:
        """The radius of one of its objects."""
        return (SINGLE_RADII_PX if len(self.things) == 1 else PAIR_RADII_PX)[thing.size]


def sample_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draws a scene from one side of the split."""
    while True:
        places = rng.choice(PAIR_PLACES) if rng.random() < 0.45 else (rng.choice(SINGLE_PLACES),)
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES), place) for place in places
        )
        scene = Scene(things, rng.choice(tuple(BACKGROUNDS)))
        if scene.held_out == held_out:
            return scene


@dataclass(frozen=True)
class SceneTensors:
    """A batch of scenes as numbers; objects that are absent have radius 0.

    Attributes:
        shape: (B, 2) int64, index into SHAPES.
        colour: (B, 2, 3) in 0..1.
        centre_px: (B, 2, 2), x and y.
        radius_px: (B, 2).
        background: (B, 3) in 0..1.
        seed: (B, 2) in 0..1, whatever a look draws at random.
    """

    shape: torch.Tensor
    colour: torch.Tensor
    centre_px: torch.Tensor
    radius_px: torch.Tensor
    background: torch.Tensor
    seed: torch.Tensor


def to_tensors(scenes: list[Scene], rng: random.Random, device: torch.device) -> SceneTensors:
    """Turns scenes into numbers, with a little jitter of place, size and colour as a painter's hand has."""

    def jitter(amount: float) -> float:
        return rng.uniform(-amount, amount)

    rows: list[list[list[float]]] = []
    for scene in scenes:
        objects = []
        for slot in range(2):
            if slot < len(scene.things):
                thing = scene.things[slot]
                x, y = scene.centre_px(thing)
                radius = scene.radius_px(thing) * (1 + jitter(0.04))
                red, green, blue = COLOURS[thing.colour]
                objects.append([SHAPES.index(thing.shape), red, green, blue, x + jitter(2.5), y + jitter(2.5), radius])
            else:
                objects.append([0, 0, 0, 0, 64, 64, 0])
        rows.append(objects)
    table = torch.tensor(rows, device=device)
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)
    tint = torch.tensor([[jitter(0.02) for _ in range(3)] for _ in scenes], device=device)
    seed = torch.tensor([[rng.random(), rng.random()] for _ in scenes], device=device)
    return SceneTensors(
        shape=table[..., 0].long(),
        colour=table[..., 1:4],
        centre_px=table[..., 4:6],
        radius_px=table[..., 6],
        background=(background + tint).clamp(0, 1),
        seed=seed,
    )

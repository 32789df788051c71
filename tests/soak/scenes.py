"""What can be asked for: adapters in several versions, and the pictures whose right answer is computed beforehand."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lora_server.demo.paths import adapters_dir

VERSIONED = {"brand": "neon", "style": "pixel-art", "filed": "hatching", "scratch": "neon"}
"""Names whose weights change, and the bundled adapter that their versions are made of."""

ALPHAS = {"brand": (6, 10, 13), "style": (9, 15, 22), "filed": (10, 14, 20), "scratch": (7,)}
"""The alpha of each version: equal tensors, another configuration, and with that another digest and another picture."""

PUSHED = ("brand", "style")
"""Uploaded; `filed` and `scratch` are loaded from a folder of the server."""

BUNDLED = ("hatching", "neon", "pixel-art", "watercolour")
LONG_STEPS = 60
_PROMPTS = ("a red star on a navy background", "two green rings", "a small white moon on top")
_COMPOSITIONS: tuple[tuple[tuple[str, float, str], ...], ...] = (
    (),
    (("neon", 1.0, ""),),
    (("hatching", 0.7, ""),),
    (("watercolour", 1.0, ""),),
    (("pixel-art", 1.0, ""), ("neon", 0.5, "")),
    (("watercolour", 0.8, ""), ("hatching", 0.4, "")),
    (("neon", 0.9, ",start=0.5"),),
    (("brand", 1.0, ""),),
    (("brand", 0.6, ""), ("watercolour", 0.5, "")),
    (("style", 1.0, ""),),
    (("style", -0.5, ""), ("neon", 1.0, "")),
    (("filed", 1.0, ""),),
    (("filed", 1.2, ""), ("pixel-art", 0.5, "")),
)
_SHAPES = ((64, 4, 1), (96, 6, 1), (64, 9, 2))
"""Side in pixels, steps, images."""


@dataclass(frozen=True, slots=True)
class Use:
    """An adapter of a case; *settings* is what follows the scale in the client's notation."""

    name: str
    scale: float
    settings: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One picture, or a few, up to the version of the one adapter in it that has versions."""

    prompt: str
    seed: int
    side_px: int
    steps: int
    images: int
    uses: tuple[Use, ...]

    @property
    def versioned(self) -> str | None:
        """The name in it that has versions."""
        return next((use.name for use in self.uses if use.name in VERSIONED), None)

    @property
    def key(self) -> str:
        """What expected pictures are found under."""
        uses = "+".join(f"{use.name}:{use.scale}{use.settings}" for use in self.uses)
        return f"{self.prompt}|{self.seed}|{self.side_px}|{self.steps}|{self.images}|{uses}"


@dataclass(frozen=True, slots=True)
class World:
    """The folder of adapters that the server may read, and the digests of all versions by name."""

    root: Path
    digests: dict[str, list[str]]

    def version(self, name: str, index: int) -> Path:
        """The folder of a version; for a bundled adapter, its own."""
        return self.root / "versions" / f"{name}-{index}" if name in VERSIONED else adapters_dir() / name

    def current(self, name: str) -> Path:
        """The folder that a name is loaded from whose weights change in place."""
        return self.root / "current" / name

    def place(self, name: str, index: int) -> Path:
        """Writes version *index* into the folder that *name* is loaded from; each file in one piece."""
        target = self.current(name)
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(self.version(name, index).iterdir()):
            aside = target / f"{source.name}.tmp"
            shutil.copyfile(source, aside)
            aside.rename(target / source.name)
        return target

    def save(self, path: Path) -> None:
        """Writes it for other processes."""
        path.write_text(json.dumps({"root": str(self.root), "digests": self.digests}))

    @staticmethod
    def load(path: Path) -> World:
        """Reads what `save` wrote."""
        found = json.loads(path.read_text())
        return World(Path(found["root"]), found["digests"])


def make_versions(world: World) -> None:
    """Writes the folders of all versions."""
    for name, origin in VERSIONED.items():
        for index, alpha in enumerate(ALPHAS[name]):
            folder = world.version(name, index)
            shutil.copytree(adapters_dir() / origin, folder, ignore=shutil.ignore_patterns("*.md"))
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))


def cases() -> list[Case]:
    """All that callers ask for."""
    return [
        Case(_PROMPTS[(index + seed) % len(_PROMPTS)], seed, *shape, tuple(Use(*use) for use in uses))
        for (index, uses), shape, seed in product(enumerate(_COMPOSITIONS), _SHAPES, (1, 2))
    ]


def long_case() -> Case:
    """A request with `scratch` that runs for long enough to take its adapter away meanwhile."""
    return Case(_PROMPTS[0], 5, 64, LONG_STEPS, 1, (Use("scratch", 1.0),))
